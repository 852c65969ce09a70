"""Fine-tuning: what a student computes, how it learns, what is kept, and the whole job on a tiny model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, safe_open
from torch import Tensor, nn
from typer.testing import CliRunner

import octavo
from octavo.checkpoint.plan import plan_part
from octavo.checkpoint.quantized import LayerOutput, OutputForm, plan_output
from octavo.checkpoint.save import Writer, save_safetensors
from octavo.checkpoint.source import open_source
from octavo.cli.main import app
from octavo.compress.finetune import Progress, Result, finetune_checkpoint
from octavo.compress.lessons import spread_steps
from octavo.compress.student import StudentLinear, close, measured, open_up, parameters_of
from octavo.compress.tuning import tune
from octavo.errors import NumericsError, OctavoError, RequestError, WrongModelError
from octavo.fp8 import Fp8Linear, LinearSpec, quantize
from octavo.fp8.matmul import plain_matmul, plain_w8a8
from octavo.fp8.scale import Granularity, Scaled
from octavo.models import MMDiT, MMDiTConfig
from octavo.quantize.layer import QuantizedLayer
from tests.tiny_tree import MODEL, write_tiny_tree

PROMPTS = [f"a {colour} {shape}" for colour in ("red", "blue") for shape in ("star", "circle")]
QUICK: dict[str, Any] = {
    "prompts": PROMPTS, "sampling_steps": 3, "width": 64, "height": 64, "batch": 2, "learning_rate": 0.01,
}  # fmt: skip


def fp8_layer(**spec: Any) -> Fp8Linear:
    """Random, 12 → 20, with bias and, if asked, a branch."""
    branch = spec.pop("branch", False)
    torch.manual_seed(0)
    layer = Fp8Linear(12, 20, LinearSpec(**spec))
    scaled = quantize(torch.randn(20, 12), granularity=layer.spec.granularity)
    layer.q, layer.scale = scaled.q, scaled.scale
    layer.bias = nn.Parameter(torch.randn(20), requires_grad=False)
    if layer.spec.input_scale:
        layer.input_scale = torch.tensor(2.0 / 448)  # clamps what is beyond 2
    if branch:
        layer.set_low_rank(torch.randn(3, 12), torch.randn(20, 3))
    return layer


# What a student computes


@pytest.mark.parametrize("granularity", ["tensor", "row"])
@pytest.mark.parametrize("static", [False, True])
def test_an_untrained_student_computes_fp8_by_fp8(granularity, static):
    layer = fp8_layer(granularity=granularity, input_scale=static)
    x = torch.randn(2, 5, 12)
    expected = plain_w8a8(x.view(10, 12), Scaled(layer.q, layer.scale), layer.bias, layer.input_scale)
    torch.testing.assert_close(StudentLinear(layer)(x).view(10, 20), expected)


def test_a_small_change_of_a_scale_is_seen_in_bfloat16_too():
    """Outputs are rounded by up to 0.4 %, but the mean over 10 000 of them follows a change of 0.1 %."""
    layer = fp8_layer(granularity="row")
    student, x = StudentLinear(layer), torch.randn(500, 12).bfloat16()
    before = student(x).double()
    student.changes["scale"].fill_(0.001)
    product = before - layer.bias
    seen = ((student(x).double() - before) * product).sum() / product.square().sum()
    assert seen.item() == pytest.approx(0.001, rel=0.1)


def test_inputs_of_exact_layers_are_not_rounded_and_branches_get_exact_ones():
    layer = fp8_layer(granularity="row", full_precision=True, branch=True)
    x = torch.randn(7, 12)
    expected = plain_matmul(x, Scaled(layer.q, layer.scale), layer.bias, None)
    expected += x @ layer.lora_down.t() @ layer.lora_up.t()
    torch.testing.assert_close(StudentLinear(layer)(x), expected)


@pytest.mark.gradients
def test_the_gradient_passes_straight_through_the_rounding_but_not_where_it_clamps():
    layer = fp8_layer(granularity="row", input_scale=True)
    x = torch.tensor([[0.3, -1.1, 5.0, -9.0] * 3], requires_grad=True)
    seed = torch.randn(1, 20)
    StudentLinear(layer)(x).backward(seed)
    whole = seed @ (layer.q.float() * layer.scale)
    torch.testing.assert_close(x.grad, torch.where(x.detach().abs() <= 2, whole, 0.0))


@pytest.mark.gradients
def test_gradients_of_scale_bias_and_branch_are_those_of_the_formula():
    """Autograd over the formula, written out with the rounded input as a constant."""
    layer = fp8_layer(granularity="row", branch=True)
    student, x, seed = StudentLinear(layer), torch.randn(7, 12), torch.randn(7, 20)
    student(x).backward(seed)

    amax = x.abs().amax(1, keepdim=True)
    rounded = (x / amax * 448).to(torch.float8_e4m3fn).float() * amax / 448
    scale, bias = layer.scale.clone().requires_grad_(), layer.bias.detach().clone().requires_grad_()
    down, up = (factor.detach().clone().requires_grad_() for factor in (layer.lora_down, layer.lora_up))
    (F.linear(rounded, layer.q.float() * scale, bias) + x @ down.t() @ up.t()).backward(seed)
    changes = student.changes
    torch.testing.assert_close(changes["scale"].grad, (scale.grad * layer.scale)[:, 0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(changes["bias"].grad, bias.grad)
    torch.testing.assert_close(changes["down"].grad, down.grad)
    torch.testing.assert_close(changes["up"].grad, up.grad)


def test_the_units_of_changes_are_the_root_mean_squares_of_channels():
    model = nn.Sequential(fp8_layer(granularity="row", full_precision=True))
    open_up(model)
    x = torch.randn(50, 12) * torch.logspace(-3, 3, 12)
    with measured(model):
        model(x[:20]), model(x[20:])
    torch.testing.assert_close(model[0].input_size, x.square().mean(0).sqrt())
    torch.testing.assert_close(model[0].output_size, model(x).square().mean(0).sqrt())


def test_a_closed_model_computes_what_its_student_did():
    model = nn.Sequential(fp8_layer(granularity="tensor", branch=True), nn.Linear(20, 4))
    open_up(model)
    x = torch.randn(9, 12)
    with measured(model):
        model(x)
    parameters = parameters_of(model)
    assert {name.split(":")[1] for name in parameters if name[0] == "0"} == {"scale", "bias", "down", "up"}
    assert [name for name in parameters if name[0] == "1"] == ["1:bias"]
    for parameter in parameters.values():
        nn.init.normal_(parameter, std=0.1)
    expected = model(x)

    close(model, torch.float32)
    first = model[0]
    y = plain_w8a8(x, Scaled(first.q, first.scale), first.bias, None) + x @ first.lora_down.t() @ first.lora_up.t()
    torch.testing.assert_close(model[1](y), expected)
    assert first.scale.shape == (20, 1)


# How it learns


def bowl(targets: Tensor) -> tuple[dict[str, nn.Parameter], Callable[[int], float]]:
    """A parameter, and the squared distance to `targets` as a loss that is noisy by step."""
    parameter = nn.Parameter(torch.zeros_like(targets))

    def loss_of_step(step: int) -> float:
        noise = torch.randn(targets.shape, generator=torch.Generator().manual_seed(step))
        with torch.enable_grad():
            loss = (parameter - targets + 0.01 * noise).square().sum()
            loss.backward()
        return float(loss.detach())

    return {"p": parameter}, loss_of_step


def test_training_finds_the_minimum(tmp_path):
    targets = torch.tensor([0.3, -0.5, 0.01])
    parameters, loss_of_step = bowl(targets)
    tune(parameters, loss_of_step, steps=200, rate=0.02, state=tmp_path / "state.safetensors", watch=lambda *_: None)
    torch.testing.assert_close(parameters["p"].detach(), targets, rtol=0, atol=0.01)


@pytest.mark.parametrize("stop", [1, 7, 8, 29])
def test_a_stopped_training_ends_in_the_same_bits(tmp_path, stop):
    def run(state: Path, watch: Callable[[int, float], object]) -> Tensor:
        parameters, loss_of_step = bowl(torch.tensor([0.3, -0.5]))
        tune(parameters, loss_of_step, steps=30, rate=0.02, state=state, watch=watch, save_every=4)
        return parameters["p"].detach()

    def stopping(step: int, _loss: float) -> None:
        if step == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", stopping)
    seen: list[int] = []
    resumed = run(tmp_path / "stopped", lambda step, _loss: seen.append(step))
    assert seen[0] == stop // 4 * 4
    assert torch.equal(resumed, run(tmp_path / "whole", lambda *_: None))


def test_a_loss_that_is_not_finite_stops_the_training(tmp_path):
    with pytest.raises(NumericsError, match="step 0"):
        tune({}, lambda _: float("nan"), steps=3, rate=1.0, state=tmp_path / "state", watch=lambda *_: None)


@pytest.mark.parametrize(("steps", "points"), [(20, 8), (28, 5), (4, 8), (7, 7)])
def test_questions_come_from_equal_stretches_of_a_run(steps, points):
    for seed in range(20):
        chosen = spread_steps(steps, points, seed)
        assert len(chosen) == min(steps, points)
        for i, step in enumerate(chosen):
            assert abs(step + 0.5 - (i + 0.5) * steps / len(chosen)) <= steps / len(chosen) / 2 + 0.5


# The whole job


def write_fp8(source: Path, path: Path, *, form: OutputForm = "octavo", off: float = 1.0) -> None:
    """The model at `source` with all linears in FP8: by row, or by tensor for ComfyUI; its scales times `off`."""
    granularity: Granularity = "row" if form == "octavo" else "tensor"
    with open_source(source) as opened:
        plan = plan_part(opened.require("mmdit"))
        output = plan_output(
            plan, {name: LayerOutput(spec=LinearSpec(granularity=granularity)) for name in plan.linears}, form
        )
        file, prefix = plan.located.file, plan.located.part.prefix
        with Writer(path, output.layout, output.metadata) as writer:
            output.copy(writer)
            for name in plan.linears:
                weight = quantize(file.read(f"{prefix}{name}.weight", torch.float32), granularity=granularity)
                layer = QuantizedLayer(
                    weight=Scaled(weight.q, weight.scale * off),
                    bias=file.read(f"{prefix}{name}.bias", torch.float16),
                    input_scale=None,
                    full_precision=False,
                    low_rank=None,
                )
                output.write(writer, name, layer)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, and FP8 files of it: `row` as good as rounding allows, `off` with scales that are 5 % too large."""
    root = write_tiny_tree(tmp_path_factory.mktemp("tree"))
    write_fp8(root / "checkpoints" / "tiny.safetensors", root / "checkpoints" / "row.safetensors")
    write_fp8(root / "checkpoints" / "tiny.safetensors", root / "checkpoints" / "off.safetensors", off=1.05)
    return root


def finetune(tree: Path, out: Path, student: str = "off", **settings: Any) -> Result:
    return finetune_checkpoint("tiny", student, out, models_dir=tree, **{"steps": 20, **QUICK, **settings})


@pytest.fixture(scope="module")
def tuned(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    out = tmp_path_factory.mktemp("tuned") / "tuned.safetensors"
    return out, finetune(tree, out, rank=4)


def test_scales_that_are_off_are_found_again(tree, tuned):
    out, result = tuned
    assert result.helped
    assert result.after.velocity < 0.8 * result.before.velocity
    assert result.after.latents < result.before.latents
    assert "is the trained one" in str(result)
    assert not list(out.parent.glob(".*")), "the work folder is gone"
    exact, off = (load_file(tree / "checkpoints" / f"{name}.safetensors") for name in ("row", "off"))
    new = load_file(out)
    name = "model.diffusion_model.joint_blocks.0.x_block.mlp.fc1.weight"
    assert torch.equal(new[name].view(torch.uint8), off[name].view(torch.uint8)), "codes stay"
    away = [(each[f"{name}_scale"] / exact[f"{name}_scale"] - 1).abs().mean() for each in (off, new)]
    assert away[1] < away[0]


def test_the_file_says_how_it_was_made_and_draws(tree, tuned):
    out, _ = tuned
    with safe_open(out, framework="pt") as file:
        metadata = file.metadata()
    said = json.loads(metadata["octavo.finetune"])
    assert (said["steps"], said["seed"], said["rank"], len(said["teacher"])) == (20, 0, 4, 64)
    components = octavo.load(out, models_dir=tree, vae="tiny", device="cpu", backend="plain-w8a8")
    layer = components.mmdit().get_submodule("joint_blocks.0.x_block.attn.qkv")
    assert isinstance(layer, Fp8Linear)
    assert layer.lora_down.shape == (4, MODEL.width)
    request = octavo.GenerateRequest(prompt="a red star", steps=2, width=64, height=64, seed=0)
    (picture,) = octavo.generate(components, request)
    assert picture.image.size == (64, 64)


def test_a_job_that_was_stopped_again_and_again_ends_in_the_same_bytes(tree, tuned, tmp_path):
    out = tmp_path / "again.safetensors"

    def stop_at(*where: object) -> Callable[[Progress], None]:
        def stopping(progress: Progress) -> None:
            if (progress.phase, progress.done) == where:
                raise KeyboardInterrupt

        return stopping

    for where in (("record", 2), ("train", 13), ("judge", 1)):
        with pytest.raises(KeyboardInterrupt):
            finetune(tree, out, rank=4, watch=stop_at(*where))
        assert not out.exists()
    assert finetune(tree, out, rank=4).resumed
    assert out.read_bytes() == tuned[0].read_bytes()


def test_training_that_does_not_help_leaves_the_student_as_it_was(tree, tmp_path):
    out = tmp_path / "worse.safetensors"
    result = finetune(tree, out, student="row", steps=3, learning_rate=0.9)
    assert not result.helped
    assert "did not help" in str(result)
    before, after = load_file(tree / "checkpoints" / "row.safetensors"), load_file(out)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8)) for name in before)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"teacher": "row"}, RequestError, "has FP8 weights itself"),
        ({"student": "tiny"}, RequestError, "no FP8 weights"),
        ({"student": "nothing"}, OctavoError, "nothing"),
        ({"prompts": ["a red star"]}, RequestError, "at least 2 prompts"),
        ({"steps": 0}, RequestError, "steps 0"),
        ({"rank": 0}, RequestError, "rank 0"),
        ({"learning_rate": 0.0}, RequestError, "learning rate 0.0"),
        ({"dtype": "float16"}, RequestError, "too narrow"),
        ({"out": "tuned.ckpt"}, RequestError, "safetensors"),
        ({"width": 4096}, RequestError, "too large"),
    ],
)
def test_what_cannot_be_done_is_said_and_nothing_is_written(tree, tmp_path, change, error, said):
    out = tmp_path / change.pop("out", "out.safetensors")
    with pytest.raises(error, match=said):
        finetune_checkpoint(
            change.pop("teacher", "tiny"), change.pop("student", "row"), out, models_dir=tree, **(QUICK | change)
        )
    assert not list(tmp_path.iterdir())


def test_files_that_are_there_are_left_alone(tree, tmp_path):
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"mine")
    with pytest.raises(RequestError, match="there already"):
        finetune(tree, out)
    with pytest.raises(RequestError, match="is what is read from"):
        finetune(tree, tree / "checkpoints" / "off.safetensors", force=True)
    assert out.read_bytes() == b"mine"


def test_a_student_of_another_shape_or_form_is_refused(tree, tmp_path):
    other = MMDiTConfig(depth=3, width=192, heads=3, context_width=128, pooled_width=128, pos_embed_size=8)
    weights = {name: tensor.half() for name, tensor in MMDiT(other).state_dict().items()}
    save_safetensors(tmp_path / "other.safetensors", weights, None)
    write_fp8(tmp_path / "other.safetensors", tmp_path / "other-fp8.safetensors")
    with pytest.raises(WrongModelError, match="of another shape"):
        finetune(tree, tmp_path / "out.safetensors", student=str(tmp_path / "other-fp8.safetensors"))
    write_fp8(tree / "checkpoints" / "tiny.safetensors", tmp_path / "comfy.safetensors", form="comfyui")
    with pytest.raises(RequestError, match="of another form"):
        finetune(tree, tmp_path / "out.safetensors", student=str(tmp_path / "comfy.safetensors"))


def test_the_command_tells_before_and_after_and_prints_the_file(tree, tmp_path):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out.safetensors"
    prompts.write_text("a red star\na blue circle\n")
    options = ["--teacher", "tiny", "--out", str(out), "--prompts", str(prompts), "--models-dir", str(tree)]
    short = ["--steps", "1", "--sampling-steps", "1", "--size", "64x64"]
    result = CliRunner().invoke(app, ["train", "distil", "off", *options, *short])
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{out}\n"
    assert result.stderr.index("before: velocity error") < result.stderr.index("after:")
    assert out.exists()
