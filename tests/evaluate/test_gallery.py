"""The folder of a comparison remembers what was drawn, and refuses to mix it with anything else."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from octavo.errors import RequestError
from octavo.evaluate.gallery import Gallery, Record, slug
from octavo.pipeline.image import Picture

RED = Picture(Image.new("RGB", (16, 16), "red"), {"prompt": "red", "seed": 1})


def record(number: int) -> Record:
    return Record(
        number=number, seconds=1.5, denoise_seconds=1.0, evaluations=4, cold=number == 1, host_bytes=10,
        device_bytes=None, latent_error=0.25,
    )  # fmt: skip


def test_what_was_drawn_is_there_when_the_folder_is_opened_again(tmp_path: Path) -> None:
    column = Gallery(tmp_path, ["a", "b"]).column("FP8 best", {"steps": 4})
    column.add(RED, record(1))
    again = Gallery(tmp_path, ["a", "b"]).column("FP8 best", {"steps": 4})
    assert again.records == {1: record(1)}
    assert again.path(1).exists()


def test_a_line_cut_by_an_interruption_is_forgotten_and_not_written_behind(tmp_path: Path) -> None:
    column = Gallery(tmp_path, ["a", "b"]).column("x", {})
    column.add(RED, record(1))
    with (column.folder / "drawn.jsonl").open("a") as file:
        file.write('{"number": 2, "sec')
    again = Gallery(tmp_path, ["a", "b"]).column("x", {})
    assert set(again.records) == {1}
    again.add(RED, record(2))
    assert set(Gallery(tmp_path, ["a", "b"]).column("x", {}).records) == {1, 2}


def test_a_picture_that_is_gone_is_drawn_again(tmp_path: Path) -> None:
    column = Gallery(tmp_path, ["a"]).column("x", {})
    column.add(RED, record(1))
    column.path(1).unlink()
    assert Gallery(tmp_path, ["a"]).column("x", {}).records == {}


def test_other_settings_are_refused_by_name_until_a_restart(tmp_path: Path) -> None:
    Gallery(tmp_path, ["a"]).column("x", {"steps": 4, "shift": 3.0}).add(RED, record(1))
    with pytest.raises(RequestError, match=r"steps was 4, now 8\. Pass --restart"):
        Gallery(tmp_path, ["a"]).column("x", {"steps": 8, "shift": 3.0})
    fresh = Gallery(tmp_path, ["a"], restart=True).column("x", {"steps": 8, "shift": 3.0})
    assert not fresh.records
    assert not fresh.path(1).exists()


def test_a_restart_removes_nothing_but_what_comparisons_make(tmp_path: Path) -> None:
    others = [tmp_path / "notes.txt", tmp_path / "pictures" / "holiday" / "1.png", tmp_path / "latents" / "mine.npy"]
    for path in others:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    gallery = Gallery(tmp_path, ["a"])
    gallery.keep_latents(1, torch.ones(1, 16, 2, 2))
    gallery.column("x", {}).add(RED, record(1))
    again = Gallery(tmp_path, ["b"], restart=True)
    assert again.latents(1) is None
    assert not again.column("x", {}).records
    assert all(path.read_text() == "mine" for path in others)


def test_other_prompts_are_refused_and_more_of_them_welcome(tmp_path: Path) -> None:
    Gallery(tmp_path, ["a", "b"]).column("x", {}).add(RED, record(1))
    assert set(Gallery(tmp_path, ["a", "b", "c"]).column("x", {}).records) == {1}
    Gallery(tmp_path, ["a"])
    assert (tmp_path / "prompts.txt").read_text().split() == ["a", "b", "c"]
    with pytest.raises(RequestError, match="number 2 was 'b', now 'z'"):
        Gallery(tmp_path, ["a", "z"])


def test_latents_come_back_as_they_were(tmp_path: Path) -> None:
    gallery = Gallery(tmp_path, ["a"])
    latents = torch.randn(1, 16, 4, 4)
    gallery.keep_latents(7, latents)
    kept = gallery.latents(7)
    assert kept is not None
    assert torch.equal(kept, latents)
    assert gallery.latents(8) is None


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RequestError, match="Cannot write to"):
        Gallery(tmp_path / "file", ["a"])


@pytest.mark.parametrize(
    ("name", "folder"), [("FP8 best", "FP8-best"), ("../x", "x"), ("a@fast", "a@fast"), ("…", "column")]
)
def test_names_make_safe_folders(name: str, folder: str) -> None:
    assert slug(name) == folder
