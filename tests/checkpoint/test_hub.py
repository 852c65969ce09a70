"""Fetching against a stand-in hub on this machine: nothing here leaves 127.0.0.1."""

import errno
import hashlib
import os
import re
import shutil
import socket
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from octavo.checkpoint import hub as fetching
from octavo.checkpoint.hub import Download, Plan, fetch, plan
from octavo.checkpoint.releases import RELEASES, STABILITY, License, PublishedFile, named
from octavo.errors import DownloadError, RequestError
from tests.hub_server import COMMIT, FakeHub, only_hub, serve

CONTENT = bytes(range(256)) * 400  # about 100 kB
FILE = PublishedFile(
    repo="stabilityai/picture-model",
    path="text_encoders/clip.safetensors",
    folder="text_encoders",
    bytes=1,  # the table may be outdated; the hub's word counts
    licenses=(STABILITY,),
)


@pytest.fixture(scope="module")
def server() -> Iterator[FakeHub]:
    with serve() as running:
        yield running


@pytest.fixture(autouse=True)
def hub(server: FakeHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    with only_hub(server, tmp_path / "hf", monkeypatch) as hub:
        hub.files[f"{FILE.repo}/{FILE.path}"] = CONTENT
        yield hub


@pytest.fixture
def models(tmp_path: Path) -> Path:
    return tmp_path / "models"


def only(found: Plan) -> Download:
    (download,) = found.downloads
    return download


def leftovers(models: Path) -> list[Path]:
    return sorted(path for path in models.rglob("*") if path.is_file() and path.suffix != ".safetensors")


def test_a_file_arrives_whole_in_its_folder(models: Path) -> None:
    download = only(plan([FILE], models))
    assert (download.bytes, download.held, download.missing) == (len(CONTENT), 0, len(CONTENT))
    place = fetch(download)
    assert place == models / "text_encoders" / "clip.safetensors"
    assert place.read_bytes() == CONTENT
    assert leftovers(models) == []


def test_planning_fetches_and_writes_nothing(hub: FakeHub, models: Path) -> None:
    plan([FILE], models)
    assert not models.exists()
    assert [request.method for request in hub.seen] == ["HEAD"]


def test_the_commit_that_was_planned_is_the_one_fetched(hub: FakeHub, models: Path) -> None:
    fetch(only(plan([FILE], models)))
    assert [f"/resolve/{COMMIT}/" in request.path for request in hub.of("hub", "GET")] == [True]


def test_a_file_that_is_here_is_not_fetched_again(hub: FakeHub, models: Path) -> None:
    place = fetch(only(plan([FILE], models)))
    hub.seen.clear()
    again = plan([FILE, FILE], models)
    assert (again.present, again.downloads) == ((place,), ())
    assert hub.of("cdn", "GET") == []


def test_a_file_in_comfyui_older_folder_counts_as_here(models: Path) -> None:
    (models / "clip").mkdir(parents=True)
    older = models / "clip" / FILE.name
    older.write_bytes(CONTENT)
    assert plan([FILE], models) == Plan(present=(older,), downloads=())


def test_a_different_file_of_that_name_is_left_alone_unless_replaced(models: Path) -> None:
    place = models / FILE.folder / FILE.name
    place.parent.mkdir(parents=True)
    place.write_bytes(b"my own work" + CONTENT[11:])  # same size, other content
    with pytest.raises(DownloadError, match="not the published file"):
        plan([FILE], models)
    assert place.read_bytes().startswith(b"my own work")
    fetch(only(plan([FILE], models, replace=True)))
    assert place.read_bytes() == CONTENT


def test_a_small_file_is_proven_by_gits_hash(tmp_path: Path) -> None:
    """Files outside LFS carry git's object name: sha1 of 'blob <size>', a zero byte and the content."""
    path = tmp_path / "small"
    path.write_bytes(b"what is up, doc?")
    known = "bd9dbf5aae1a3862dd1526723246b20206e5fc37"  # from the Git book, chapter Git Internals
    assert fetching._digest(path, known) == known


class TestBrokenConnections:
    def test_a_cut_connection_is_taken_up_where_it_broke(
        self, hub: FakeHub, models: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        hub.cut_after = [30_000, 20_000]
        assert fetch(only(plan([FILE], models))).read_bytes() == CONTENT
        assert hub.ranges == [None, "bytes=30000-", "bytes=50000-"]
        assert capfd.readouterr().err == ""

    def test_a_later_run_goes_on_from_what_an_earlier_one_brought(self, hub: FakeHub, models: Path) -> None:
        hub.cut_after = [30_000] + [0] * 50
        with pytest.raises(DownloadError, match="the same command goes on"):
            fetch(only(plan([FILE], models)))
        assert not (models / FILE.folder / FILE.name).exists()
        hub.cut_after = []
        hub.seen.clear()
        second = only(plan([FILE], models))
        assert (second.held, second.missing) == (30_000, len(CONTENT) - 30_000)
        assert fetch(second).read_bytes() == CONTENT
        assert hub.ranges == ["bytes=30000-"]

    def test_a_server_without_ranges_sends_all_again(self, hub: FakeHub, models: Path) -> None:
        hub.cut_after = [30_000]
        hub.knows_ranges = False
        assert fetch(only(plan([FILE], models))).read_bytes() == CONTENT

    def test_an_unfinished_download_of_an_older_version_is_not_continued(self, hub: FakeHub, models: Path) -> None:
        hub.cut_after = [30_000] + [0] * 50
        with pytest.raises(DownloadError):
            fetch(only(plan([FILE], models)))
        newer = hub.files[f"{FILE.repo}/{FILE.path}"] = CONTENT[::-1]
        hub.cut_after = []
        assert fetch(only(plan([FILE], models))).read_bytes() == newer
        assert leftovers(models) == []

    def test_a_download_that_grew_too_long_starts_afresh(self, models: Path) -> None:
        download = only(plan([FILE], models))
        download.part.parent.mkdir(parents=True)
        download.part.write_bytes(CONTENT + b"surplus")
        assert fetch(download).read_bytes() == CONTENT

    def test_a_complete_download_is_only_checked_and_moved(self, hub: FakeHub, models: Path) -> None:
        download = only(plan([FILE], models))
        download.part.parent.mkdir(parents=True)
        download.part.write_bytes(CONTENT)
        assert fetch(download).read_bytes() == CONTENT
        assert hub.of("cdn", "GET") == []

    @settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(cuts=st.lists(st.integers(1, 40_000), max_size=4))
    def test_wherever_it_breaks_the_file_comes_out_whole(self, hub: FakeHub, models: Path, cuts: list[int]) -> None:
        shutil.rmtree(models, ignore_errors=True)
        hub.cut_after = list(cuts)
        assert fetch(only(plan([FILE], models))).read_bytes() == CONTENT


class TestDamage:
    def test_content_with_a_wrong_hash_never_gets_the_final_name(self, hub: FakeHub, models: Path) -> None:
        hub.damaged = True
        digest = hashlib.sha256(CONTENT).hexdigest()
        with pytest.raises(DownloadError, match=f"published hash {digest}"):
            fetch(only(plan([FILE], models)))
        assert list(models.rglob("*.safetensors")) == []
        assert leftovers(models) == []  # going on from damaged bytes would never end well
        hub.damaged = False
        assert fetch(only(plan([FILE], models))).read_bytes() == CONTENT

    def test_a_failed_replacement_leaves_the_old_file(self, hub: FakeHub, models: Path) -> None:
        place = models / FILE.folder / FILE.name
        place.parent.mkdir(parents=True)
        place.write_bytes(b"old")
        hub.damaged = True
        with pytest.raises(DownloadError):
            fetch(only(plan([FILE], models, replace=True)))
        assert place.read_bytes() == b"old"

    def test_a_server_that_tells_no_hash_is_not_believed(self, hub: FakeHub, models: Path) -> None:
        hub.announces_hash = False
        with pytest.raises(DownloadError, match="neither size nor hash"):
            plan([FILE], models)


class TestTokens:
    @pytest.fixture(autouse=True)
    def gated(self, hub: FakeHub) -> None:
        hub.gated = {FILE.repo}
        hub.accounts = {"hf_accepted": {FILE.repo}, "hf_stranger": set()}

    def test_without_a_token_the_way_to_one_is_told(self, hub: FakeHub, models: Path) -> None:
        with pytest.raises(DownloadError, match="accept its licence at") as refused:
            plan([FILE], models)
        assert f"{hub.url}/{FILE.repo}" in str(refused.value)
        assert "HF_TOKEN" in str(refused.value)

    def test_an_unknown_token_is_told_from_a_missing_one(self, models: Path) -> None:
        with pytest.raises(DownloadError, match="mistyped or has expired"):
            plan([FILE], models, token="hf_typo")

    def test_an_account_without_access_is_sent_to_the_licence(self, models: Path) -> None:
        with pytest.raises(DownloadError, match="no access to"):
            plan([FILE], models, token="hf_stranger")

    @pytest.mark.parametrize("source", ["argument", "environment", "login"])
    def test_a_token_opens_the_repository(
        self, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
    ) -> None:
        token = "hf_accepted" if source == "argument" else None
        if source == "environment":
            monkeypatch.setenv("HF_TOKEN", "hf_accepted")
        if source == "login":
            (tmp_path / "hf").mkdir()
            (tmp_path / "hf" / "token").write_text("hf_accepted")
        assert fetch(only(plan([FILE], models, token=token)), token=token).read_bytes() == CONTENT

    def test_the_token_never_leaves_the_hub(self, hub: FakeHub, models: Path) -> None:
        fetch(only(plan([FILE], models, token="hf_accepted")), token="hf_accepted")
        assert {request.token for request in hub.seen if request.server == "hub"} == {"hf_accepted"}
        assert {request.token for request in hub.seen if request.server == "cdn"} == {None}


class TestRefusals:
    """One line each, that says what to do."""

    @pytest.mark.parametrize(
        ("status", "advice"), [(404, "moved or withdrawn"), (429, "Wait some minutes"), (503, "answered 503")]
    )
    def test_a_refusal_is_one_line(self, hub: FakeHub, models: Path, status: int, advice: str) -> None:
        hub.status = status
        with pytest.raises(DownloadError, match=advice) as refused:
            plan([FILE], models)
        assert "\n" not in str(refused.value)

    def test_a_file_that_is_gone(self, models: Path) -> None:
        with pytest.raises(DownloadError, match=re.escape("has no file gone.safetensors (404)")):
            plan([replace(FILE, path="gone.safetensors")], models)

    def test_a_server_that_is_down(self, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}/")
        with pytest.raises(DownloadError, match=f"No connection to http://127.0.0.1:{port} ") as refused:
            plan([FILE], models)
        assert "\n" not in str(refused.value)

    def test_a_name_that_does_not_resolve(self, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def unknown(*_: object, **__: object) -> None:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

        monkeypatch.setattr(socket, "getaddrinfo", unknown)
        monkeypatch.delenv("HF_ENDPOINT")
        with pytest.raises(DownloadError, match=r"No connection to https://huggingface\.co .*not known"):
            plan([FILE], models)

    def test_a_server_that_goes_down_in_between(self, hub: FakeHub, models: Path) -> None:
        download = only(plan([FILE], models))
        hub.status = 503
        with pytest.raises(DownloadError, match="answered 503"):
            fetch(download)

    def test_offline_mode_is_named(self, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(DownloadError, match="HF_HUB_OFFLINE is set"):
            plan([FILE], models)

    def test_a_second_pull_of_the_same_file_is_held_off(self, models: Path) -> None:
        download = only(plan([FILE], models))
        download.part.parent.mkdir(parents=True)
        with fetching._only_here(download), pytest.raises(DownloadError, match="Another octavo pull"):
            fetch(download)


class TestDisks:
    def test_too_small_a_disk_is_told_before_anything_is_fetched(
        self, hub: FakeHub, models: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 1000, 1000))
        with pytest.raises(DownloadError, match=r"0\.00 GB free"):
            plan([FILE], models)
        assert hub.of("cdn", "GET") == []

    def test_only_what_is_missing_needs_room(self, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        download = only(plan([FILE], models))
        download.part.parent.mkdir(parents=True)
        download.part.write_bytes(CONTENT[:-500])
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 1000, 1000))
        assert only(plan([FILE], models)).missing == 500

    def test_a_disk_that_fills_up_keeps_what_came(self, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        download = only(plan([FILE], models))

        def half_then_full(_: str, part: BinaryIO, **__: object) -> None:
            if download.held == 0:
                part.write(CONTENT[:5000])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr("huggingface_hub.file_download.http_get", half_then_full)
        with pytest.raises(DownloadError, match="disk is full"):
            fetch(download)
        assert download.held == 5000
        assert not download.target.exists()

    def test_a_file_where_the_folder_should_be(self, models: Path) -> None:
        models.write_text("not a folder")
        with pytest.raises(DownloadError, match="--models-dir"):
            fetch(only(plan([FILE], models)))


class TestReleases:
    def test_each_file_has_a_licence_and_a_place_of_its_own(self) -> None:
        files = {file for release in RELEASES.values() for file in release.files}
        assert all(file.licenses for file in files)
        assert len({(file.folder, file.name) for file in files}) == len(files)

    def test_weights_of_stability_ask_for_consent_and_others_do_not(self) -> None:
        def asks(name: str) -> bool:
            licenses: set[License] = {terms for file in RELEASES[name].files for terms in file.licenses}
            return any(terms.must_accept for terms in licenses)

        assert {name for name in RELEASES if not asks(name)} == {"text-encoders", "text-encoders-fp8"}

    def test_a_name_may_be_spelled_as_the_file_is(self) -> None:
        assert [release.name for release in named(["SD3.5_Large", "sd3.5-large"])] == ["sd3.5-large"]

    def test_an_unknown_name_brings_a_suggestion(self) -> None:
        with pytest.raises(RequestError, match=re.escape("Did you mean 'sd3.5-medium'?")):
            named(["sd35-medium"])
