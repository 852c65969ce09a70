"""ControlNets become FP8 files by the recipes that models do: jobs on nets for the tiny model, of both layouts."""

import sys
from functools import partial
from pathlib import Path
from typing import Literal, cast

import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from torch import Tensor, nn

import octavo
from octavo import GenerateRequest
from octavo.checkpoint.describe import describe
from octavo.checkpoint.layout import pieces_in
from octavo.checkpoint.load import load_controlnet
from octavo.checkpoint.save import save_safetensors
from octavo.checkpoint.source import open_source
from octavo.compress.control_blocks import ControlStream
from octavo.compress.control_points import control_picture
from octavo.compress.job import quantize_checkpoint
from octavo.compress.progress import Progress
from octavo.compress.stages import Batch
from octavo.compress.write import Summary
from octavo.errors import GateError, ModelNotFoundError, OctavoError, RequestError, WrongModelError
from octavo.fp8 import Fp8Linear
from octavo.models import ControlNet, ControlNetConfig
from octavo.pipeline.control_request import ControlImage
from octavo.quantize import load_recipe, quantize_layer
from tests.compress.small import model, settings
from tests.tiny_tree import MODEL

Layout = Literal["single-file", "diffusers"]
RELEASED = ControlNetConfig(
    depth=2, width=MODEL.width, heads=MODEL.heads, qk_norm=True, pooled_width=MODEL.pooled_width, context_width=0,
    control_type="canny",
)  # fmt: skip
JOINT = ControlNetConfig(
    depth=2, width=MODEL.width, heads=MODEL.heads, joint=True, pooled_width=MODEL.pooled_width,
    context_width=MODEL.context_width, pos_embed_size=8, last=False, zero_pooled=False,
)  # fmt: skip
NETS: dict[str, tuple[Layout, ControlNetConfig]] = {
    "canny": ("single-file", RELEASED),
    "joint": ("diffusers", JOINT),
}


def write_net(path: Path, layout: Layout, config: ControlNetConfig) -> None:
    """A random net in float16, as its layout names and cuts its tensors."""
    torch.manual_seed(3)
    net = ControlNet(config)
    tensors: dict[str, Tensor] = {}
    for name, tensor in net.state_dict().items():
        pieces = pieces_in("controlnet", layout, name)
        for piece, part in zip(pieces, tensor.chunk(len(pieces)), strict=True):
            tensors[piece.name] = part.half().contiguous()
    said = {"octavo.config": '{"zero_pooled": false}'} if config.joint else {}
    if config.control_type:
        tensors["control_type"] = torch.tensor([1])
    path.parent.mkdir(exist_ok=True)
    save_safetensors(path, tensors, said)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    model(root)
    for name, (layout, config) in NETS.items():
        write_net(root / "controlnet" / f"{name}.safetensors", layout, config)
    return root


def quantized(tree: Path, out: Path, name: str = "canny", **given: object) -> Summary:
    return quantize_checkpoint(name, out, settings(tree, **{"model": "tiny", "force": True, **given}))


def weight_of(layer: nn.Module) -> Tensor:
    """What the layer multiplies by, float32."""
    eye = torch.eye(layer.in_features if isinstance(layer, nn.Linear) else cast(Fp8Linear, layer).q.shape[1])
    bias = cast("Tensor | None", layer.bias)
    out = cast(Tensor, layer(eye))
    return (out if bias is None else out - bias).T


@pytest.mark.parametrize("name", NETS)
def test_a_recipe_without_calibration_is_followed_to_the_letter_whatever_the_layout(
    tree: Path, tmp_path: Path, name: str
) -> None:
    """No model is asked for; queries, keys and values that lie apart in the file are quantized as the one they are."""
    out = tmp_path / "row.safetensors"
    (written,) = quantized(tree, out, name, recipe="row", model=None).files
    source, result = (load_controlnet(path) for path in (tree / "controlnet" / f"{name}.safetensors", out))
    assert result.config == source.config == NETS[name][1]
    rule = load_recipe("row").default
    for layer, plain in source.named_modules():
        if isinstance(plain, nn.Linear):
            expected = quantize_layer(layer, plain.weight.half(), None, rule, None).weight
            found = result.get_submodule(layer)
            assert isinstance(found, Fp8Linear)
            assert torch.equal(found.q.view(torch.uint8), expected.q.view(torch.uint8)), layer
            assert torch.equal(found.scale, expected.scale)
    layout = NETS[name][0]
    if layout == "single-file":
        assert int(load_file(out)["control_type"]) == 1
    else:
        assert "transformer_blocks.0.attn.to_q.weight_scale" in load_file(out)
    assert written.fp8_weights == written.linear_weights
    (part,) = describe(out).parts
    assert part.kind == "controlnet"
    assert (part.fp8_layers, part.fp8_rowwise) == (part.linear_layers, part.linear_layers)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("keep", [True, False])
def test_block_by_block_the_net_gives_what_it_gives_as_a_whole(tree: Path, name: str, keep: bool) -> None:
    path, config = tree / "controlnet" / f"{name}.safetensors", NETS[name][1]
    net = load_controlnet(path)
    generator = torch.Generator().manual_seed(1)
    random = partial(torch.randn, generator=generator)
    latents, hint, tokens = random(2, 16, 8, 8), random(2, 16, 8, 8), random(2, 16, config.width)
    context, pooled, sigma = random(2, 8, MODEL.context_width), random(2, config.pooled_width), torch.rand(2)
    with torch.inference_mode():
        tables = net.modulation(1000 * sigma, pooled)
        expected = net(latents, hint, context, tables, embed=lambda _: tokens)
        with open_source(path) as source:
            stream = ControlStream(source.require("controlnet"), torch.device("cpu"), torch.float32, keep=keep)
            batch = Batch(latents, sigma, context, pooled, hint=hint, image=None if config.pos_embed_size else tokens)
            for stage in stream.stages:
                with stream.loaded(stage):
                    stream.advance(stage, [batch])
                assert all(p.is_meta for p in stream.model.parameters()) is not keep
    assert [name for stage in stream.stages for name in stream.linears(stage)].sort() == list(
        stream.plan.linears
    ).sort()
    assert len(batch.residuals) == config.depth
    for found, wanted in zip(batch.residuals, expected, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    ("name", "recipe", "form"),
    [
        ("canny", "best", "octavo"),
        ("canny", "comfy", "comfyui"),
        ("canny", "static", "octavo"),
        ("joint", "best", "octavo"),
        ("joint", "comfy", "comfyui"),
    ],
)
def test_calibrated_files_steer_as_the_16_bit_net_does(
    tree: Path, tmp_path: Path, name: str, recipe: str, form: str
) -> None:
    """At full strength: what the net adds to the picture is the same to a few percent; a plain cast loses more."""
    files = {each: tmp_path / f"{each}.safetensors" for each in (recipe, "cast")}
    summary = quantized(tree, files[recipe], name, recipe=recipe, form=form)
    quantized(tree, files["cast"], name, recipe="cast", model=None)
    assert summary.source_bytes > 1.7 * summary.files[0].nbytes or recipe != "comfy"
    photo = tmp_path / "photo.png"
    picture = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(picture).ellipse((12, 20, 50, 52), fill="black")
    picture.save(photo)
    components = octavo.load("tiny", models_dir=tree, device="cpu", dtype="float32")

    def latents(net: Path | None) -> Tensor:
        given = () if net is None else (ControlImage(image=str(photo), model=str(net), preprocess="canny"),)
        seen: list[Tensor] = []
        request = GenerateRequest(prompt="a red star", width=64, height=64, steps=1, seed=5, controls=given)
        octavo.generate(
            components, request, watch=lambda p: seen.append(p.denoised) if p.denoised is not None else None
        )
        return seen[-1]

    without, exact = latents(None), latents(tree / "controlnet" / f"{name}.safetensors")
    pull = (exact - without).norm()
    errors = {each: float((latents(path) - exact).norm() / pull) for each, path in files.items()}
    assert pull > 0
    assert errors[recipe] < 0.1
    assert errors[recipe] < errors["cast"]


def test_the_gate_draws_by_both_nets(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "judged.safetensors"
    (written,) = quantized(tree, out, recipe="row", gate=2, min_psnr=10.0).files
    assert len(written.verdict.decibels) == 2
    assert written.verdict.mean > 10
    with pytest.raises(GateError, match="follow the 16-bit ControlNet"):
        quantized(tree, tmp_path / "never.safetensors", recipe="row", gate=1, min_psnr=99.0, force=False)
    assert not (tmp_path / "never.safetensors").exists()


def test_what_was_calibrated_before_a_stop_is_not_drawn_again(tree: Path, tmp_path: Path) -> None:
    phases: list[str] = []
    out, whole = tmp_path / "net.safetensors", tmp_path / "whole.safetensors"
    quantized(tree, whole)

    class Stopped(BaseException):
        pass

    def stop(progress: Progress) -> None:
        if progress.phase == "write" and progress.done > 20_000:
            raise Stopped

    with pytest.raises(Stopped):
        quantize_checkpoint("canny", out, settings(tree, model="tiny"), watch=stop)
    assert not out.exists()
    summary = quantize_checkpoint(
        "canny", out, settings(tree, model="tiny"), watch=lambda progress: phases.append(progress.phase)
    )
    assert summary.resumed
    assert "trajectories" not in phases
    assert out.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    ("name", "given", "error", "says"),
    [
        ("canny", {"keep_16bit": 0.05}, RequestError, "--keep-16bit is for models.*recipe"),
        ("canny", {"finetune": 10}, RequestError, "--finetune is for models"),
        ("canny", {"model": None}, RequestError, "--model sd3.5_large.*--recipe row"),
        ("canny", {"model": "nothere"}, ModelNotFoundError, "nothere"),
        ("canny", {"model": "octavo-demo"}, WrongModelError, "width 128"),
        ("tiny", {}, RequestError, "--model tiny is for ControlNets"),
        ("octavo-demo-canny", {"model": None}, RequestError, "is FP8 already"),
        ("canny", {"form": "comfyui", "recipe": "row"}, RequestError, "ComfyUI does not read"),
    ],
)
def test_what_cannot_be_done_is_refused_with_its_reason(
    tree: Path, tmp_path: Path, name: str, given: dict[str, object], error: type[OctavoError], says: str
) -> None:
    with pytest.raises(error, match=f"(?s){says}"):
        quantized(tree, tmp_path / "no.safetensors", name, **{"force": False, **given})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["blur", "canny", "depth", None])
def test_pictures_to_calibrate_on_are_of_the_kind_that_the_net_follows(
    kind: Literal["blur", "canny", "depth"] | None,
) -> None:
    """A black square on white: its edges are thin lines, its blur has greys in between, its brightness is itself."""
    picture = torch.ones(1, 3, 32, 32)
    picture[..., 8:24, 8:24] = 0
    made = control_picture(picture, ControlNetConfig(depth=1, width=64, heads=1, control_type=kind))
    assert made.shape == picture.shape
    between = float(((made > 0.01) & (made < 0.99)).float().mean())
    match kind:
        case "blur":
            assert between > 0.2
            assert made.mean() == pytest.approx(float(picture.mean()), abs=0.02)
        case "depth":
            torch.testing.assert_close(made, picture)
        case _:
            assert between == 0
            assert 0.02 < made.mean() < 0.2


def test_the_command_takes_a_net(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from octavo.cli import main as cli

    out = tmp_path / "cli.safetensors"
    words = ["quantize", str(tree / "controlnet" / "canny.safetensors"), str(out), "--recipe", "row", "--model", "tiny"]
    monkeypatch.setattr(sys, "argv", ["octavo", *words, "--models-dir", str(tree), "--device", "cpu", "-q"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert not left.value.code
    assert out.exists()
