"""Training a LoRA: what is read from a folder, what is learned, and that a stopped run ends like one that was not."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import octavo
from octavo.checkpoint.lora import read_lora
from octavo.checkpoint.lora_form import LoraForm
from octavo.errors import RequestError
from octavo.fp8 import Fp8Linear
from octavo.models import MMDiT
from octavo.models.adapter import adapted
from octavo.pipeline.components import Components
from octavo.sampling.flow import shift_sigma
from octavo.train import lora as job
from octavo.train.branches import Branches
from octavo.train.folder import read_examples, read_lessons, size_for
from octavo.train.lora import Batch, LoraRecipe, draw_batch, flow_loss, train_lora
from tests.tiny_tree import write_tiny_tree

pytestmark = pytest.mark.gradients

RECIPE = LoraRecipe(rank=2, steps=12, batch=3, size=32, learning_rate=0.01)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_tree(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def components(tree: Path) -> Components:
    return octavo.load("tiny", models_dir=tree, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def fp8(tree: Path) -> Components:
    return octavo.load("tiny", models_dir=tree, device="cpu", dtype="float32", force_fp8=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five pictures of three proportions."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for i, (width, height) in enumerate([(32, 32), (40, 40), (64, 32), (30, 30), (32, 64)]):
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a {'red' if i % 2 else 'blue'}\nstar")
    return folder


def quiet(_line: str) -> None:
    pass


def train(
    components: Components, data: Path, out: Path, recipe: LoraRecipe = RECIPE, **more: object
) -> dict[str, Tensor]:
    return load_file(train_lora(components, data, out, recipe=recipe, report=quiet, **more))  # type: ignore[arg-type]


# ── the folder ────────────────────────────────────────────────────────────────────────────────────────────────────
def test_captions_stand_beside_pictures_or_in_one_file(data: Path, tmp_path: Path) -> None:
    assert [each.caption for each in read_examples(data)][:2] == ["a blue star", "a red star"]
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "b.jpg")
    lines = [json.dumps({"file_name": "a.png", "text": "one"}), ""]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    assert [each.caption for each in read_examples(tmp_path, caption="other")] == ["one", "other"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has no pictures"),
        ({"a.png": None}, "'a.txt' beside it"),
        ({"a.png": None, "metadata.jsonl": "{}"}, "line 1: need"),
        ({"metadata.jsonl": '{"file_name": "b.png", "text": "x"}'}, "no such picture"),
    ],
)
def test_a_folder_that_teaches_nothing_is_refused(tmp_path: Path, files: dict[str, str | None], message: str) -> None:
    for name, text in files.items():
        if text is None:
            Image.new("RGB", (8, 8)).save(tmp_path / name)
        else:
            (tmp_path / name).write_text(text)
    with pytest.raises(RequestError, match=message):
        read_examples(tmp_path)
    with pytest.raises(RequestError, match="no folder"):
        read_examples(tmp_path / "nowhere")


@pytest.mark.parametrize(("width", "height"), [(100, 100), (3000, 2000), (100, 900), (17, 2)])
def test_pictures_keep_their_area_and_nearly_their_proportions(width: int, height: int) -> None:
    """Each side is rounded by at most half a step, or held at one step."""
    across, down = size_for(width, height, 512**2, 64)
    assert across % 64 == down % 64 == 0
    exact = (512 * (width / height) ** 0.5, 512 * (height / width) ** 0.5)
    assert all(side == 64 or abs(side - wanted) <= 32 for side, wanted in zip((across, down), exact, strict=True))


def test_what_was_encoded_is_used_again_unless_something_changed(
    components: Components, data: Path, tmp_path: Path
) -> None:
    said: list[str] = []

    def lessons(area: int, caption: str | None = None) -> int:
        examples = read_examples(data)
        if caption:
            examples[0] = replace(examples[0], caption=caption)
        cache = tmp_path / "lessons.safetensors"
        found = read_lessons(components, examples, area=area, step=16, cache=cache, report=said.append)
        assert sum(map(len, found.groups)) == len(examples)
        return len(found.groups)

    assert lessons(32**2) == 3  # sizes
    assert lessons(32**2) == 3
    assert len(said) == 1
    lessons(48**2)
    lessons(48**2, "a red circle")
    assert len(said) == 3


def test_a_damaged_picture_is_named(components: Components, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    (tmp_path / "bad.txt").write_text("a star")
    with pytest.raises(RequestError, match=r"bad\.png cannot be read"):
        train(components, tmp_path, tmp_path / "out.safetensors")


# ── the arithmetic ────────────────────────────────────────────────────────────────────────────────────────────────
def batch_of(components: Components, data: Path, tmp_path: Path) -> Batch:
    cache = tmp_path / "lessons.safetensors"
    lessons = read_lessons(components, read_examples(data), area=32**2, step=16, cache=cache)
    return draw_batch(lessons, 0, RECIPE, 3.0)


@pytest.mark.parametrize("layers", ["attention", "blocks", "all"])
def test_gradients_are_those_of_the_formula_whether_activations_are_kept_or_not(
    components: Components, data: Path, tmp_path: Path, layers: str
) -> None:
    """A step along the gradient changes the loss by the gradient's length squared, to first order."""
    mmdit = components.mmdit().requires_grad_(False)
    branches = Branches(mmdit, layers=layers, rank=2, alpha=4, seed=0)
    torch.manual_seed(0)
    for name, parameter in branches.named_parameters():
        if name.endswith("up"):
            torch.nn.init.normal_(parameter, std=0.05)
    batch = batch_of(components, data, tmp_path)

    def loss(checkpointing: bool = False) -> Tensor:
        return flow_loss(mmdit, batch, trained_modulation=branches.on_modulation, checkpointing=checkpointing)

    parameters = list(branches.parameters())
    with branches.attached(mmdit):
        kept, again = (torch.autograd.grad(loss(each), parameters) for each in (False, True))
    for one, other in zip(kept, again, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)
    assert all(gradient.abs().max() > 0 for gradient in kept)
    squared = float(sum((gradient**2).sum() for gradient in kept))
    step = 1e-4 / squared
    with torch.no_grad(), branches.attached(mmdit):
        values = []
        for sign in (1, -1):
            for parameter, gradient in zip(parameters, kept, strict=True):
                parameter.add_(gradient, alpha=sign * step)
            values.append(float(loss()))
            for parameter, gradient in zip(parameters, kept, strict=True):
                parameter.sub_(gradient, alpha=sign * step)
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(squared, rel=0.05)


def test_noise_levels_are_logit_normal_and_shifted(components: Components, data: Path, tmp_path: Path) -> None:
    """Half of them lie below the shifted middle: within three standard errors of 400 draws."""
    cache = tmp_path / "lessons.safetensors"
    lessons = read_lessons(components, read_examples(data), area=32**2, step=16, cache=cache)
    batches = [draw_batch(lessons, step, replace(RECIPE, batch=4), 3.0) for step in range(100)]
    sigma = torch.cat([batch.sigma for batch in batches])
    middle = float(shift_sigma(torch.tensor(0.5), 3.0))
    assert abs(float((sigma < middle).float().mean()) - 0.5) < 3 * 0.5 / 400**0.5
    unsaid = [batch.prompts[0] is lessons.empty for batch in batches]
    assert abs(sum(unsaid) / 100 - RECIPE.drop_captions) < 3 * (0.09 / 100) ** 0.5
    assert {each is lessons.empty for batch in batches for each in batch.prompts} == {True, False}


def test_at_first_the_model_is_what_it_was(components: Components) -> None:
    mmdit = components.mmdit()
    branches = Branches(mmdit, layers="all", rank=4, alpha=4, seed=0)
    x = torch.randn(2, 128, generator=torch.Generator().manual_seed(0))
    layer = mmdit.get_submodule("joint_blocks.0.x_block.attn.qkv")
    before = layer(x)
    with branches.attached(mmdit):
        assert torch.equal(layer(x), before)


# ── the run ───────────────────────────────────────────────────────────────────────────────────────────────────────
def test_a_stopped_run_ends_like_one_that_was_not(
    components: Components, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(components, data, tmp_path / "whole.safetensors")

    class Stop(Exception):  # noqa: N818
        pass

    def stopping(lessons: object, step: int, *rest: object) -> Batch:
        if step == 7:
            raise Stop
        return draw_batch(lessons, step, *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(job, "draw_batch", stopping)
        with pytest.raises(Stop):
            train(components, data, tmp_path / "half.safetensors", save_every_seconds=-1)
    assert not (tmp_path / "half.safetensors").exists()
    again = train(components, data, tmp_path / "half.safetensors")
    assert whole.keys() == again.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, again[name])
    with pytest.raises(RequestError, match="rank 2, not 4"):
        train(components, data, tmp_path / "half.safetensors", replace(RECIPE, rank=4))


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_on_an_fp8_base_the_loss_falls_and_codes_stay(
    fp8: Components, data: Path, tmp_path: Path, form: LoraForm
) -> None:
    mmdit = fp8.mmdit()
    codes = {
        name: layer.q.view(torch.uint8).clone() for name, layer in mmdit.named_modules() if isinstance(layer, Fp8Linear)
    }
    assert codes
    out = tmp_path / "lora.safetensors"
    train(fp8, data, out, replace(RECIPE, steps=60, drop_captions=0.0), form=form)
    mmdit = fp8.mmdit()
    adapter = read_lora(out, {"mmdit": mmdit})["mmdit"]
    batch = batch_of(fp8, data, tmp_path)
    with torch.no_grad():
        before = float(flow_loss(mmdit, batch))
        with adapted(mmdit, [(adapter, 1.0)]):
            after = float(flow_loss(mmdit, batch))
    assert after < 0.96 * before
    for name, code in codes.items():
        layer = mmdit.get_submodule(name)
        assert isinstance(layer, Fp8Linear)
        assert torch.equal(layer.q.view(torch.uint8), code)


def test_sheets_are_drawn_on_the_way_and_change_nothing(components: Components, data: Path, tmp_path: Path) -> None:
    plain = train(components, data, tmp_path / "plain.safetensors")
    shown = train(
        components,
        data,
        tmp_path / "shown.safetensors",
        sample_every=8,
        sample_prompts=["a red star"],
        work=tmp_path / "w",
    )
    assert sorted(path.name for path in (tmp_path / "w").glob("*.png")) == ["sheet-000008.png", "sheet-000012.png"]
    assert all(torch.equal(tensor, shown[name]) for name, tensor in plain.items())


def test_a_model_that_has_drawn_already_can_be_trained(tree: Path, data: Path, tmp_path: Path) -> None:
    components = octavo.load("tiny", models_dir=tree, device="cpu", dtype="float32")
    octavo.generate(components, octavo.GenerateRequest(prompt="a red star", steps=1, width=32, height=32))
    assert train(components, data, tmp_path / "a.safetensors", replace(RECIPE, steps=1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"rank": 0}, "rank 0"), ({"learning_rate": -1}, "learning rate"), ({"drop_captions": 1.0}, "drop_captions"),
     ({"alpha": 0}, "alpha"), ({"steps": 0}, "steps")],
)  # fmt: skip
def test_settings_out_of_range_are_refused(changes: dict[str, float], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        LoraRecipe(**changes)  # type: ignore[arg-type]


def test_layers_are_chosen_by_name(components: Components) -> None:
    mmdit = components.mmdit()
    assert isinstance(mmdit, MMDiT)
    names = {
        choice: set(Branches(mmdit, layers=choice, rank=1, alpha=1, seed=0).names)
        for choice in ("attention", "blocks", "all")
    }
    assert names["attention"] < names["blocks"] < names["all"]
    assert not any("adaLN" in name for name in names["blocks"])
    with pytest.raises(RequestError, match="Did you mean 'blocks'"):
        Branches(mmdit, layers="block", rank=1, alpha=1, seed=0)


def test_a_run_that_computes_activations_again_learns_the_same(
    components: Components, data: Path, tmp_path: Path
) -> None:
    recipe = replace(RECIPE, steps=3)
    kept, again = (
        train(components, data, tmp_path / f"{each}.safetensors", recipe, checkpointing=each) for each in (False, True)
    )
    for name, tensor in kept.items():
        assert torch.allclose(tensor.float(), again[name].float(), rtol=2**-7, atol=1e-4)
