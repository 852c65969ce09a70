"""The whole way: models in memory, pictures on disk, numbers in the report; stopped, resumed, and put beside others."""

import json
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from octavo import Components, load
from octavo.errors import MissingExtraError, RequestError
from octavo.evaluate import scores as scoring
from octavo.evaluate.columns import FolderColumn, ModelColumn
from octavo.evaluate.comparison import Comparison, Options, compare, open_report
from octavo.evaluate.drawn import Drawn, matched
from octavo.evaluate.features import read_pixels
from octavo.evaluate.metrics import MOST_DECIBELS, psnr
from octavo.evaluate.prompt_set import Prompt, builtin_prompts
from octavo.evaluate.report import write_report

pytest.importorskip("torchmetrics", reason="the eval extra is not installed")

PROMPTS = builtin_prompts(4, embedded=True)
OPTIONS = Options(settings={"steps": 2, "width": 64, "height": 64}, drawings=12, velocity_prompts=1)


@pytest.fixture(scope="module", autouse=True)
def _few_resamples() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "RESAMPLES", 8)
        yield


@pytest.fixture(scope="module")
def original() -> Components:
    return load("octavo-demo", device="cpu")


@pytest.fixture(scope="module")
def rough() -> Components:
    """The same model with a tenth of noise on its last layer."""
    components = load("octavo-demo", device="cpu")
    weight = components.mmdit().final_layer.linear.weight
    with torch.no_grad():
        noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
        weight += 0.1 * weight.norm() / noise.norm() * noise
    return components


def columns(original: Components, rough: Components) -> list[ModelColumn]:
    return [ModelColumn.of(name, model) for name, model in (("16-bit", original), ("same", original), ("rough", rough))]


@pytest.fixture(scope="module")
def made(original: Components, rough: Components, tmp_path_factory: pytest.TempPathFactory) -> tuple[Comparison, Path]:
    out = tmp_path_factory.mktemp("comparison")
    options = replace(OPTIONS, other_seeds=True)
    comparison = compare(columns(original, rough), PROMPTS, out=out, options=options, command="octavo evaluate …")
    write_report(comparison, out)
    return comparison, out


def scores(comparison: Comparison, name: str) -> dict[str, float]:
    (column,) = (column for column in comparison.columns if column.drawn.name == name)
    return dict(column.scores.overall)


def test_the_same_model_under_another_name_is_equal_in_every_number(made: tuple[Comparison, Path]) -> None:
    comparison, _ = made
    same, reference = scores(comparison, "same"), scores(comparison, "16-bit")
    assert same["psnr"] == same["psnr_pooled"] == same["psnr_worst"] == MOST_DECIBELS
    assert same["equal_pictures"] == len(PROMPTS)
    assert same["ssim"] == 1
    assert same["latent_error"] == same["distance"] == 0
    assert same["fid_rise"] == same["fid_rise_low"] == same["fid_rise_high"] == 0
    for name in ("score", "fid", "cmmd", "right_all"):
        assert same[name] == reference[name]
    velocity = comparison.columns[1].drawn.velocity
    assert velocity is not None
    assert velocity.whole == 0


def test_a_rougher_model_is_further_away_by_every_measure(made: tuple[Comparison, Path]) -> None:
    comparison, out = made
    rough = scores(comparison, "rough")
    assert rough["psnr"] < 40
    assert rough["ssim"] < 1
    assert min(rough["latent_error"], rough["distance"], rough["fid_to_reference"], rough["cmmd_to_reference"]) > 0
    velocity = comparison.columns[2].drawn.velocity
    assert velocity is not None
    # A tenth of noise in the weights, independent of what they multiply, is about a tenth in what comes out.
    assert velocity.whole == pytest.approx(0.1, rel=0.3)
    first, second = (read_pixels(out / "pictures" / name / "00002.png") for name in ("16-bit", "rough"))
    assert comparison.columns[2].scores.by_picture[2]["psnr"] == psnr(second, first)


def test_other_seeds_come_last_and_are_not_compared_picture_by_picture(made: tuple[Comparison, Path]) -> None:
    comparison, _ = made
    assert [column.drawn.name for column in comparison.columns][-1] == "16-bit, other seeds"
    others = scores(comparison, "16-bit, other seeds")
    assert "psnr" not in others
    assert "latent_error" not in others
    assert others["fid_to_reference"] > 0


def test_every_picture_carries_its_prompt_and_seed(made: tuple[Comparison, Path]) -> None:
    from octavo.pipeline.image import read_settings

    for number, prompt in enumerate(PROMPTS, 1):
        settings = read_settings(made[1] / "pictures" / "rough" / f"{number:05}.png")
        assert (settings["prompt"], settings["seed"], settings["steps"]) == (prompt.text, number - 1, 2)


def test_a_run_that_was_stopped_goes_on_to_identical_results(
    made: tuple[Comparison, Path], original: Components, rough: Components, tmp_path: Path
) -> None:
    class StopError(Exception):
        pass

    def stop(column: str, stage: str, done: int, _total: int) -> None:
        if (column, stage, done) == ("rough", "draw", 2):
            raise StopError

    options = replace(OPTIONS, other_seeds=True)
    with pytest.raises(StopError):
        compare(columns(original, rough), PROMPTS, out=tmp_path, options=options, watch=stop)
    drawn_before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")}
    assert len(drawn_before) == 4 * 3 + 2
    resumed = compare(columns(original, rough), PROMPTS, out=tmp_path, options=options)
    assert resumed.results() == made[0].results()
    assert [dict(column.scores.overall) for column in resumed.columns] == [
        dict(column.scores.overall) for column in made[0].columns
    ]
    assert all(path.stat().st_mtime_ns == time for path, time in drawn_before.items())


def test_other_settings_in_the_same_folder_are_refused(
    made: tuple[Comparison, Path], original: Components, rough: Components
) -> None:
    options = replace(OPTIONS, settings={**OPTIONS.settings, "steps": 3})
    with pytest.raises(RequestError, match="steps was 2, now 3"):
        compare(columns(original, rough), PROMPTS, out=made[1], options=options)


def test_a_model_that_changed_in_memory_is_not_taken_for_the_one_before(
    made: tuple[Comparison, Path], rough: Components
) -> None:
    with pytest.raises(RequestError, match="weights was"):
        compare([ModelColumn.of("16-bit", rough)], PROMPTS, out=made[1], options=OPTIONS)


def test_the_report_holds_the_numbers_in_all_its_forms(made: tuple[Comparison, Path]) -> None:
    comparison, out = made
    page, text = (out / "report.html").read_text("utf-8"), (out / "report.md").read_text("utf-8")
    report = json.loads((out / "report.json").read_text("utf-8"))
    assert report == json.loads(json.dumps(comparison.to_json()))
    rough = report["columns"][2]
    assert rough["name"] == "rough"
    for shown in (
        f"{rough['scores']['psnr']:.2f} dB",
        f"{rough['velocity']['whole']:.4f}",
        "the embedded model's judge",
    ):
        assert shown in text
        assert shown.replace("'", "&#x27;") in page
    assert "octavo evaluate …" in page
    assert "CLIP" not in page.replace("--clip", "")
    results = json.loads((out / "results.json").read_text("utf-8"))
    assert results["columns"]["rough"]["1"]["psnr"] == comparison.columns[2].scores.by_picture[1]["psnr"]


def test_the_page_needs_no_other_file(made: tuple[Comparison, Path]) -> None:
    page = (made[1] / "report.html").read_text("utf-8")
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in page
    assert page.count('src="') == page.count('src="data:image/webp;base64,')
    assert page.count("<figure>") == 4 * len(PROMPTS)
    for name in ("error-by-step", "error-by-layer"):
        ElementTree.fromstring((made[1] / f"{name}.svg").read_text("utf-8"))


def test_pictures_made_elsewhere_stand_beside_a_report(made: tuple[Comparison, Path], tmp_path: Path) -> None:
    for number in (1, 2, 3):
        Image.new("RGB", (96, 64), "red").save(tmp_path / f"{number}.webp")
    prompts, drawn, _ = open_report(made[1])
    assert prompts == PROMPTS
    foreign = FolderColumn(name="FLUX.1 dev", folder=tmp_path)
    together = compare([*drawn, foreign], prompts, options=OPTIONS)
    assert together.columns[0].drawn.name == "16-bit"
    assert scores(together, "FLUX.1 dev")["pictures"] == 3
    assert "psnr" not in scores(together, "FLUX.1 dev")
    assert scores(together, "rough") == scores(made[0], "rough")
    assert together.columns[0].performance == made[0].columns[0].performance


def test_columns_of_another_report_keep_their_pictures_by_prompt_and_lose_the_seed(tmp_path: Path) -> None:
    ours = [Prompt("a"), Prompt("b"), Prompt("a")]
    theirs = [Prompt("b"), Prompt("c"), Prompt("a")]
    paths = {number: tmp_path / f"{number}.png" for number in (1, 2, 3)}
    (column,) = matched([Drawn(name="x", paths=paths, same_seed=True)], theirs, ours, same_reference=False)
    assert column.paths == {2: paths[1], 1: paths[3]}
    assert not column.same_seed
    with pytest.raises(RequestError, match="no prompt in common"):
        matched([column], theirs, [Prompt("z")], same_reference=True)


@pytest.mark.parametrize("broken", ["", "{", '{"format": 99}', '{"format": 1}'])
def test_a_folder_that_is_no_report_is_refused(broken: str, tmp_path: Path) -> None:
    if broken:
        (tmp_path / "report.json").write_text(broken)
    with pytest.raises(RequestError, match="report"):
        open_report(tmp_path)


def test_columns_of_one_name_and_nothing_to_compare_are_refused(original: Components) -> None:
    twice = [ModelColumn.of("x", original), ModelColumn.of("x", original)]
    with pytest.raises(RequestError, match="Two columns are called 'x'"):
        compare(twice, PROMPTS)
    with pytest.raises(RequestError, match="at least one"):
        compare([], PROMPTS)


def test_torchmetrics_is_asked_for_before_anything_is_drawn(
    original: Components, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    with pytest.raises(MissingExtraError, match=r"octavo\[eval\]"):
        compare([ModelColumn.of("x", original)], PROMPTS, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
