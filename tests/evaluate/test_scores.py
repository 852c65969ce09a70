"""Scores of pictures that lie in folders: words that are read, reference sets, and no PSNR without a common seed."""

from pathlib import Path

import pytest
from PIL import Image

from octavo.errors import RequestError
from octavo.evaluate.columns import FolderColumn
from octavo.evaluate.comparison import Comparison, Options, compare
from octavo.evaluate.prompt_set import Prompt

pytest.importorskip("torchmetrics", reason="the eval extra is not installed")

PROMPTS = [Prompt('a sign "OPEN LATE"'), Prompt("a star"), Prompt('a mug "TEA"'), Prompt("a moon")]
COLOURS = ("red", "green", "blue", "yellow")


class Reader:
    """Reads the same words in every picture that is not black."""

    name = "a stand-in"

    def __call__(self, image: Image.Image) -> str:
        return "open tea" if image.convert("RGB").getpixel((0, 0)) != (0, 0, 0) else ""


def folder(path: Path, *colours: str) -> FolderColumn:
    path.mkdir()
    for number, colour in enumerate(colours, 1):
        Image.new("RGB", (32, 32), colour).save(path / f"{number}.png")
    return FolderColumn(name=path.name, folder=path)


@pytest.fixture
def compared(tmp_path: Path) -> Comparison:
    columns = [folder(tmp_path / "a", *COLOURS), folder(tmp_path / "b", "red", "black", "black")]
    folder(tmp_path / "truth", *COLOURS)
    return compare(columns, PROMPTS, options=Options(reader=Reader(), reference_folder=tmp_path / "truth"))


def test_words_are_scored_where_a_prompt_asks_for_some(compared: Comparison) -> None:
    """Half of OPEN LATE and all of TEA are read; in the second column the mug is black."""
    a, b = compared.columns
    assert [a.scores.by_picture[number].get("typography") for number in (1, 2, 3, 4)] == [0.5, None, 1.0, None]
    assert a.scores.overall["typography"] == 0.75
    assert b.scores.overall["typography"] == 0.25
    assert compared.reader == "a stand-in"


def test_a_set_that_equals_the_reference_set_is_at_no_distance_and_another_is(compared: Comparison) -> None:
    a, b = (column.scores.overall for column in compared.columns)
    assert a["fid"] == pytest.approx(0, abs=1e-6)
    assert a["cmmd"] == pytest.approx(0, abs=1e-9)
    assert min(b["fid"], b["cmmd"]) > 1e-3
    assert compared.reference_set == "4 pictures of truth"


def test_pictures_without_a_common_seed_are_not_compared_one_by_one(compared: Comparison) -> None:
    assert all("psnr" not in column.scores.overall for column in compared.columns)
    assert [column.scores.overall["pictures"] for column in compared.columns] == [4, 3]
    assert compared.columns[0].performance == {}


def test_a_reference_set_of_one_picture_is_refused(tmp_path: Path) -> None:
    one = folder(tmp_path / "one", "red")
    with pytest.raises(RequestError, match="at least two"):
        compare([one], PROMPTS, options=Options(reference_folder=one.folder))


def test_a_damaged_picture_is_named(tmp_path: Path) -> None:
    column = folder(tmp_path / "a", "red", "green")
    (column.folder / "2.png").write_bytes(b"no picture")
    with pytest.raises(RequestError, match=r"2\.png"):
        compare([column], PROMPTS)
