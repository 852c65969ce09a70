"""What is written on the command line becomes the right column, and pictures find their prompts."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from octavo import load
from octavo.errors import ModelNotFoundError, RequestError
from octavo.evaluate.columns import (
    DiffusersColumn,
    FolderColumn,
    ModelColumn,
    fp8_weights,
    identity,
    model_facts,
    parse_column,
    weight_bytes,
)
from octavo.fp8 import Fp8Linear

PROMPTS = ["one", "two", "three"]


def pictures(folder: Path, *names: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name in names:
        Image.new("RGB", (16, 16), "red").save(folder / name)
    return folder


@pytest.mark.parametrize(
    ("text", "name", "how"),
    [
        ("octavo-demo", "octavo-demo", ""),
        ("octavo-demo-fp8@plain-w8a8", "octavo-demo-fp8@plain-w8a8", "plain-w8a8"),
        ("FP8=octavo-demo-fp8@fast+force-fp8", "FP8", "fast+force-fp8"),
        ("models/a.b.safetensors", "a.b", ""),
        ("sd3.5_large", "sd3.5_large", ""),
    ],
)
def test_models_are_named_by_their_files_or_as_asked(text: str, name: str, how: str) -> None:
    column = parse_column(text)
    assert isinstance(column, ModelColumn)
    assert (column.name, column.how) == (name, how)


def test_the_arithmetic_behind_the_at_sign_is_used() -> None:
    column = parse_column("octavo-demo-fp8@plain-w8a8")
    assert isinstance(column, ModelColumn)
    with column.opened() as components:
        assert "by plain-w8a8" in model_facts(components)["arithmetic"]
        assert components.mmdit.loaded
    assert not components.mmdit.loaded


def test_unknown_arithmetic_and_unknown_models_are_refused_by_name() -> None:
    with pytest.raises(RequestError, match="two backends"):
        parse_column("octavo-demo@cpu+plain")
    column = parse_column("octavo-demo-fp8@warp")
    assert isinstance(column, ModelColumn)
    with pytest.raises(RequestError, match="warp"):
        column.load()
    missing = parse_column("no-such-model")
    assert isinstance(missing, ModelColumn)
    with pytest.raises(ModelNotFoundError):
        missing.load()


def test_a_folder_of_pictures_and_a_pipeline_are_told_from_models(tmp_path: Path) -> None:
    column = parse_column(f"FLUX.1-dev={pictures(tmp_path / 'flux', '1.png')}")
    assert isinstance(column, FolderColumn)
    assert column.name == "FLUX.1-dev"
    pipeline = parse_column("diffusers:stabilityai/sdxl-turbo", device="cpu")
    assert isinstance(pipeline, DiffusersColumn)
    assert (pipeline.name, pipeline.path, pipeline.device) == ("sdxl-turbo", "stabilityai/sdxl-turbo", "cpu")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("a.png", "b.jpg", "c.webp"), {1: "a.png", 2: "b.jpg", 3: "c.webp"}),  # by order
        (("x-3.png", "x-1.png"), {1: "x-1.png", 3: "x-3.png"}),  # by number
        (("10.png", "2.png"), None),  # beyond the prompts
        (("p0.png", "p2.png"), {1: "p0.png", 3: "p2.png"}),  # counted from 0
        (("fox.png", "x-1.png"), {1: "fox.png", 2: "x-1.png"}),  # not all have numbers
    ],
)
def test_pictures_belong_to_prompts_by_number_or_order(
    names: tuple[str, ...], expected: dict[int, str] | None, tmp_path: Path
) -> None:
    column = FolderColumn(name="x", folder=pictures(tmp_path / "x", *names))
    if expected is None:
        with pytest.raises(RequestError, match="beyond the 3 prompts"):
            column.pictures(PROMPTS)
    else:
        assert {number: path.name for number, path in column.pictures(PROMPTS).items()} == expected


def test_a_list_of_prompts_in_the_folder_decides(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "x", "1.png", "2.png", "3.png")
    (folder / "prompts.txt").write_text("three\nfour\none\n", "utf-8")
    column = FolderColumn(name="x", folder=folder)
    assert {number: path.name for number, path in column.pictures(PROMPTS).items()} == {3: "1.png", 1: "3.png"}
    (folder / "prompts.txt").write_text("four\nfive\nsix\n", "utf-8")
    with pytest.raises(RequestError, match="None of the prompts"):
        column.pictures(PROMPTS)


def test_an_empty_folder_and_none_at_all_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no pictures"):
        FolderColumn(name="x", folder=tmp_path).pictures(PROMPTS)
    with pytest.raises(RequestError, match="Cannot read"):
        FolderColumn(name="x", folder=tmp_path / "none").pictures(PROMPTS)


def test_a_model_in_memory_is_told_by_its_weights_and_stays_there() -> None:
    components = load("octavo-demo")
    column = ModelColumn.of("x", components)
    before = identity(column, components)
    assert identity(column, components) == before
    with torch.no_grad():
        components.mmdit().final_layer.linear.weight[0, 0] += 1
    assert identity(column, components)["weights"] != before["weights"]
    with column.opened():
        pass
    assert components.mmdit.loaded


def test_the_share_of_weights_in_fp8_and_their_bytes_are_counted() -> None:
    plain, fp8 = load("octavo-demo").mmdit(), load("octavo-demo-fp8").mmdit()
    linear = sum(m.weight.numel() for m in plain.modules() if isinstance(m, torch.nn.Linear))
    assert fp8_weights(plain) == (0, linear)
    # The last layer stays as it is.
    final = plain.final_layer.linear.weight.numel()
    assert fp8_weights(fp8) == (linear - final, linear)
    # float32 has four bytes a weight, FP8 one and its scales.
    layers = [m for m in fp8.modules() if isinstance(m, Fp8Linear)]
    scales = sum(m.scale.nbytes + (0 if m.input_scale is None else m.input_scale.nbytes) for m in layers)
    assert weight_bytes(plain) - weight_bytes(fp8) == 3 * (linear - final) - scales
