"""`octavo pull` as a user meets it, against a stand-in hub on this machine."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from click.testing import Result
from typer.testing import CliRunner

from octavo.checkpoint.releases import RELEASES
from octavo.cli.pull import pull
from octavo.errors import DownloadError, RequestError
from tests.hub_server import FakeHub, only_hub, serve

MEDIUM = RELEASES["sd3.5-medium"].files[0]
CONTENT = b"weights " * 2000


@pytest.fixture(scope="module")
def server() -> Iterator[FakeHub]:
    with serve() as running:
        yield running


@pytest.fixture(autouse=True)
def hub(server: FakeHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    """Every file that the table names, small, and gated where it is in earnest."""
    with only_hub(server, tmp_path / "hf", monkeypatch) as hub:
        for file in (file for release in RELEASES.values() for file in release.files):
            hub.files[f"{file.repo}/{file.path}"] = CONTENT + file.name.encode()
            hub.gated |= {file.repo} if file.gated else set()
        hub.accounts = {"hf_mine": hub.gated}
        monkeypatch.setenv("HF_TOKEN", "hf_mine")
        monkeypatch.setenv("OCTAVO_MODELS", str(tmp_path / "models"))
        yield hub


def run(*arguments: str, answer: str | None = None) -> Result:
    app = typer.Typer()
    app.command()(pull)
    return CliRunner().invoke(app, list(arguments), input=answer)


def test_the_place_of_each_file_is_printed_and_the_licence_shown(hub: FakeHub, tmp_path: Path) -> None:
    result = run("sd3.5-medium", "--yes")
    place = tmp_path / "models" / "checkpoints" / "sd3.5_medium.safetensors"
    assert result.stdout == f"{place}\n"
    assert place.read_bytes() == hub.files[f"{MEDIUM.repo}/{MEDIUM.path}"]
    assert "Stability AI Community License" in result.stderr
    assert "https://stability.ai/" in result.stderr


def test_several_names_share_their_files(hub: FakeHub) -> None:
    result = run("text-encoders", "text-encoders-fp8")
    assert [Path(line).name for line in result.stdout.splitlines()] == [
        "clip_l.safetensors",
        "clip_g.safetensors",
        "t5xxl_fp16.safetensors",
        "t5xxl_fp8_e4m3fn_scaled.safetensors",
    ]
    assert len(hub.of("cdn", "GET")) == 4


@pytest.mark.parametrize("name", RELEASES)
def test_every_name_brings_its_files_to_their_folders(name: str, tmp_path: Path) -> None:
    assert run(name, "--yes").exit_code == 0
    for file in RELEASES[name].files:
        assert (tmp_path / "models" / file.folder / file.name).is_file()


def test_a_second_time_nothing_is_fetched_and_nothing_asked(hub: FakeHub) -> None:
    run("sd3.5-medium", "--yes")
    hub.seen.clear()
    result = run("sd3.5-medium")
    assert result.exit_code == 0
    assert "Already here" in result.stderr
    assert hub.of("cdn", "GET") == []


def test_the_licence_is_asked_about_and_yes_goes_on() -> None:
    result = run("sd3.5-medium", answer="y\n")
    assert "Do you accept these terms?" in result.stderr
    assert result.exit_code == 0


@pytest.mark.parametrize("answer", ["n\n", ""], ids=["no", "nobody there"])
def test_without_consent_nothing_is_fetched(hub: FakeHub, answer: str) -> None:
    result = run("sd3.5-medium", answer=answer)
    assert isinstance(result.exception, RequestError)
    assert "--yes" in str(result.exception)
    assert hub.of("cdn", "GET") == []


def test_free_licences_are_shown_and_not_asked_about() -> None:
    result = run("text-encoders")
    assert result.exit_code == 0
    assert "MIT" in result.stderr
    assert "Apache-2.0" in result.stderr
    assert "accept" not in result.stderr


def test_a_model_alone_brings_a_word_about_text_encoders() -> None:
    assert "octavo pull text-encoders" in run("sd3.5-medium", "--yes").stderr
    assert "octavo pull text-encoders" not in run("sd3.5-large", "text-encoders", "--yes").stderr
    assert "octavo pull text-encoders" not in run("sd3.5-medium", "--yes").stderr  # they are here by now


def test_an_interrupted_download_says_how_much_is_here(hub: FakeHub) -> None:
    hub.cut_after = [8000] + [0] * 50
    assert isinstance(run("sd3.5-medium", "--yes").exception, DownloadError)
    hub.cut_after = []
    result = run("sd3.5-medium", "--yes")
    assert "of which 0.01 MB are here" in result.stderr
    assert hub.ranges[-1] == "bytes=8000-"


def test_force_replaces_a_different_file(hub: FakeHub, tmp_path: Path) -> None:
    place = tmp_path / "models" / "checkpoints" / MEDIUM.name
    place.parent.mkdir(parents=True)
    place.write_bytes(b"something else")
    refused = run("sd3.5-medium", "--yes").exception
    assert isinstance(refused, DownloadError)
    assert "--force" in str(refused)
    run("sd3.5-medium", "--yes", "--force")
    assert place.read_bytes() == hub.files[f"{MEDIUM.repo}/{MEDIUM.path}"]


def test_the_list_names_all_and_marks_what_is_here(hub: FakeHub) -> None:
    run("sd3.5-medium", "--yes")
    hub.seen.clear()
    rows = {line.split()[0]: line for line in run("--list").stdout.splitlines()[1:] if not line.startswith(" ")}
    assert set(RELEASES) <= set(rows)
    assert {name for name, row in rows.items() if "yes" in row.split()} == {"sd3.5-medium"}
    assert hub.seen == []


def test_no_name_and_an_unknown_name_tell_what_there_is() -> None:
    assert "--list" in str(run().exception)
    assert "Did you mean 'text-encoders'" in str(run("textencoders").exception)


class TestAsACommand:
    """The whole command in a process of its own, as a shell runs it."""

    def command(self, tmp_path: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
        environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1"}
        program = "from octavo.cli.main import main; main()"
        return subprocess.run(
            [sys.executable, "-c", program, "pull", *arguments],
            env=environment,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            check=False,
        )

    def test_the_hub_of_the_environment_is_used(self, hub: FakeHub, tmp_path: Path) -> None:
        done = self.command(tmp_path, "sd3.5-medium", "--yes")
        assert (done.returncode, done.stdout) == (0, f"{tmp_path}/models/checkpoints/{MEDIUM.name}\n")
        assert hub.of("cdn", "GET") != []

    def test_a_refusal_is_one_line_and_exit_code_2(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("HF_TOKEN")
        refused = self.command(tmp_path, "sd3.5-medium", "--yes")
        assert refused.returncode == 2
        assert re.fullmatch(r"octavo: .*HF_TOKEN.*\n", refused.stderr)

    def test_a_server_that_is_down_is_one_line_and_exit_code_2(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # the discard port: nobody listens
        refused = self.command(tmp_path, "text-encoders")
        assert refused.returncode == 2
        assert re.fullmatch(r"octavo: No connection to http://127\.0\.0\.1:9 .*\n", refused.stderr)
