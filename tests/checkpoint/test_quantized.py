"""Quantized files that we write: read back they are what was put in, and ComfyUI's form is ComfyUI's to the byte."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from octavo.checkpoint import load_mmdit
from octavo.checkpoint.describe import describe
from octavo.checkpoint.plan import Plan, plan_part
from octavo.checkpoint.quantized import LayerOutput, Output, OutputForm, plan_output
from octavo.checkpoint.resume import ResumableWriter
from octavo.checkpoint.save import Writer, save_safetensors
from octavo.checkpoint.source import open_source
from octavo.errors import CorruptFileError, RequestError
from octavo.fp8 import E4M3FN, E5M2, FORMATS, Fp8Linear, LinearSpec, Scaled, quantize
from octavo.models import MMDiT
from octavo.quantize.layer import QuantizedLayer
from tests.checkpoint.samples import MMDIT_PREFIX, all_in_one, tiny, write_diffusers_folder
from tests.checkpoint.test_formats import by_the_rule, values_of
from tests.goldens import golden

ROW = LayerOutput(spec=LinearSpec(granularity="row"))
BLOCK = LayerOutput(spec=LinearSpec(granularity="block", block=(96, 64)))
TENSOR = LayerOutput(spec=LinearSpec())
BEST = LayerOutput(spec=LinearSpec(granularity="row", input_scale=True, full_precision=True), low_rank=2)

STEPS = LayerOutput(spec=LinearSpec(granularity="row", input_scale=True, step_sigmas=(0.8, 0.5)))


def quantized(weight: Tensor, bias: Tensor | None, output: LayerOutput) -> QuantizedLayer:
    """A layer made as the output announces it, with a bias that was corrected."""
    generator = torch.Generator().manual_seed(3)
    rank, (rows, columns) = output.low_rank, weight.shape
    return QuantizedLayer(
        weight=quantize(weight, output.spec.format, output.spec.granularity, block=output.spec.block),
        bias=None if bias is None else bias + 0.25,
        input_scale=torch.tensor([0.125, 0.5, 0.25] if output.spec.step_sigmas else 0.125)
        if output.spec.input_scale
        else None,
        step_sigmas=output.spec.step_sigmas,
        full_precision=output.spec.full_precision,
        low_rank=(torch.randn(rank, columns, generator=generator).half(), torch.randn(rows, rank).half())
        if rank
        else None,
    )


def write(source: Path, to: Path, output: LayerOutput, form: OutputForm = "octavo") -> dict[str, QuantizedLayer]:
    """Quantize every linear of the blocks; returns the layers by our names."""
    weights = load_mmdit(source, dtype=torch.float16).state_dict()
    with open_source(source) as opened:
        plan = plan_part(opened.require("mmdit"))
        names = [name for name in plan.linears if name.startswith("joint_blocks.")]
        layers = {name: quantized(weights[f"{name}.weight"], weights.get(f"{name}.bias"), output) for name in names}
        planned = plan_output(plan, dict.fromkeys(names, output), form, {"octavo.recipe": 'name = "mine"'})
        fill(planned, Writer(to, planned.layout, planned.metadata), layers)
    return layers


def fill(planned: Output, writer: Writer, layers: dict[str, QuantizedLayer]) -> None:
    with writer:
        planned.copy(writer)
        for name in planned.missing(writer):
            planned.write(writer, name, layers[name])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    save_safetensors(tmp_path / "all.safetensors", all_in_one(), {"modelspec.title": "Tiny"})
    return tmp_path / "all.safetensors"


def assert_holds(model: MMDiT, layers: dict[str, QuantizedLayer]) -> None:
    """Quantized layers are those put in; everything else is as in the tiny source."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, Fp8Linear)}
    assert found.keys() == layers.keys()
    for name, put in layers.items():
        layer = found[name]
        assert torch.equal(layer.q.view(torch.uint8), put.weight.q.view(torch.uint8))
        assert torch.equal(layer.scale, put.weight.scale)
        assert layer.spec.full_precision == put.full_precision
        assert layer.spec.step_sigmas == put.step_sigmas
        for got, given in ((layer.bias, put.bias), (layer.input_scale, put.input_scale)):
            assert (got is None) == (given is None)
            assert got is None or torch.equal(got, given.float())  # type: ignore[union-attr]
        down, up = put.low_rank or (None, None)
        for got, given in ((layer.lora_down, down), (layer.lora_up, up)):
            assert (got is None) == (given is None)
            assert got is None or torch.equal(got, given.float())  # type: ignore[union-attr]
    state = model.state_dict()
    for name, tensor in tiny("mmdit").items():
        if name.rpartition(".")[0] not in layers:
            assert torch.equal(state[name], tensor.float())


@pytest.mark.parametrize(
    ("output", "form"),
    [(ROW, "octavo"), (BLOCK, "octavo"), (TENSOR, "octavo"), (BEST, "octavo"), (STEPS, "octavo"), (TENSOR, "comfyui")],
)
def test_what_is_loaded_is_what_was_put_in(tmp_path: Path, source: Path, output: LayerOutput, form: OutputForm) -> None:
    layers = write(source, tmp_path / "q.safetensors", output, form)
    assert_holds(load_mmdit(tmp_path / "q.safetensors"), layers)


def test_other_parts_are_copied_byte_for_byte(tmp_path: Path, source: Path) -> None:
    write(source, tmp_path / "q.safetensors", ROW)
    before, after = load_file(source), load_file(tmp_path / "q.safetensors")
    for name, tensor in before.items():
        if not name.startswith(MMDIT_PREFIX):
            assert after[name].dtype == tensor.dtype
            assert torch.equal(after[name], tensor)
    description = describe(tmp_path / "q.safetensors")
    assert [part.kind for part in description.parts] == ["mmdit", "clip_l", "clip_g", "t5", "vae"]
    assert description.metadata["modelspec.title"] == "Tiny"
    assert description.metadata["octavo.version"]
    assert description.parts[0].fp8_form == "octavo form: e4m3fn by row, recipe mine"


def test_a_scaled_part_beside_it_stays_readable(tmp_path: Path) -> None:
    """The header describes another part's FP8 layers in ComfyUI's way; ours are added in our own."""
    tensors = all_in_one()
    name = "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q"
    scaled = quantize(tensors[f"{name}.weight"])
    tensors |= {f"{name}.weight": scaled.q, f"{name}.weight_scale": scaled.scale}
    header = {"_quantization_metadata": json.dumps({"layers": {name: {"format": "float8_e4m3fn"}}})}
    save_safetensors(tmp_path / "all.safetensors", tensors, header)
    layers = write(tmp_path / "all.safetensors", tmp_path / "q.safetensors", ROW)
    assert_holds(load_mmdit(tmp_path / "q.safetensors"), layers)
    parts = {part.kind: part for part in describe(tmp_path / "q.safetensors").parts}
    assert parts["t5"].fp8_form == "e4m3fn, scaled, described in the header"
    assert parts["t5"].fp8_layers == 1


def test_a_diffusers_folder_becomes_a_single_file_of_this_part(tmp_path: Path) -> None:
    folder = write_diffusers_folder(tmp_path / "folder")
    layers = write(folder, tmp_path / "q.safetensors", BEST)
    assert_holds(load_mmdit(tmp_path / "q.safetensors"), layers)
    assert all(name.startswith(MMDIT_PREFIX) for name in load_file(tmp_path / "q.safetensors"))


def planned(path: Path, layers: Callable[[Plan], dict[str, LayerOutput]], form: OutputForm = "octavo") -> Output:
    with open_source(path) as opened:
        plan = plan_part(opened.require("mmdit"))
        return plan_output(plan, layers(plan), form)


def test_files_for_comfyui_are_those_that_comfyui_reads(tmp_path: Path) -> None:
    """The recorded comfy_quant_layers file, made again by us from reference_bf16 and its own codes, byte for byte.

    Its layers are of all sorts: e4m3fn and e5m2, one in 16 bits, one in full precision, some with an input scale.
    """
    recorded = load_file(golden("comfyui/formats/comfy_quant_layers.safetensors"))
    outputs: dict[str, LayerOutput] = {}
    layers: dict[str, QuantizedLayer] = {}
    for key in [name for name in recorded if name.endswith(".comfy_quant")]:
        full = key.removesuffix(".comfy_quant")
        described = json.loads(bytes(recorded[key].tolist()))
        whole = described.get("full_precision_matrix_mult", False)
        codes, input_scale = recorded[f"{full}.weight"], recorded.get(f"{full}.input_scale")
        spec = LinearSpec(format=FORMATS[codes.dtype], input_scale=input_scale is not None, full_precision=whole)
        outputs[full.removeprefix(MMDIT_PREFIX)] = LayerOutput(spec=spec)
        layers[full.removeprefix(MMDIT_PREFIX)] = QuantizedLayer(
            weight=Scaled(codes, recorded[f"{full}.weight_scale"]),
            bias=recorded.get(f"{full}.bias"),
            input_scale=input_scale,
            full_precision=whole,
            low_rank=None,
        )
    assert {output.spec.format for output in outputs.values()} == {E4M3FN, E5M2}
    with open_source(golden("comfyui/formats/reference_bf16.safetensors")) as opened:
        output = plan_output(plan_part(opened.require("mmdit")), outputs, "comfyui")
        fill(output, Writer(tmp_path / "q.safetensors", output.layout, output.metadata), layers)
    written = load_file(tmp_path / "q.safetensors")
    assert written.keys() == recorded.keys()
    for name, tensor in recorded.items():
        assert written[name].dtype == tensor.dtype
        assert written[name].shape == tensor.shape
        assert torch.equal(written[name].float(), tensor.float()), name


def test_comfyuis_rule_gives_exactly_the_dequantized_weights(tmp_path: Path, source: Path) -> None:
    """The rule of formats.json: W = weight · weight_scale in float32."""
    layers = write(source, tmp_path / "q.safetensors", TENSOR, "comfyui")
    tensors = {
        key: value for key, value in load_file(tmp_path / "q.safetensors").items() if key.startswith(MMDIT_PREFIX)
    }
    values = by_the_rule(tensors)
    for name, layer in layers.items():
        assert torch.equal(values[f"{name}.weight"], layer.weight.q.float() * layer.weight.scale)
    ours = values_of(load_mmdit(tmp_path / "q.safetensors"))
    assert all(torch.equal(ours[name], tensor) for name, tensor in values.items())


def test_the_layout_is_known_before_a_weight_is_read(tmp_path: Path, source: Path) -> None:
    """NaN in every weight is found by copying only."""
    broken = {name: torch.full_like(tensor, torch.nan) if tensor.is_floating_point() else tensor
              for name, tensor in all_in_one().items()}  # fmt: skip
    save_safetensors(tmp_path / "nan.safetensors", broken)

    def every(plan: Plan) -> dict[str, LayerOutput]:
        return dict.fromkeys(plan.linears, ROW)

    layout = planned(source, every).layout
    with open_source(tmp_path / "nan.safetensors") as opened:
        plan = plan_part(opened.require("mmdit"))
        output = plan_output(plan, every(plan))
        assert output.layout == layout
        with pytest.raises(CorruptFileError, match="NaN"):
            fill(output, Writer(tmp_path / "q.safetensors", output.layout, output.metadata), {})
    assert not (tmp_path / "q.safetensors").exists()


def test_an_interrupted_job_ends_in_the_same_file(tmp_path: Path, source: Path) -> None:
    layers = write(source, tmp_path / "whole.safetensors", BEST)
    with open_source(source) as opened:
        output = plan_output(
            plan_part(opened.require("mmdit")),
            dict.fromkeys(layers, BEST),
            "octavo",
            {"octavo.recipe": 'name = "mine"'},
        )
        path = tmp_path / "q.safetensors"

        def interrupted() -> None:
            with ResumableWriter(path, output.layout, output.metadata) as writer:
                output.copy(writer)
                for name in list(layers)[:4]:
                    output.write(writer, name, layers[name])
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            interrupted()
        again = ResumableWriter(path, output.layout, output.metadata)
        assert output.missing(again) == [name for name in output.layers if name not in list(layers)[:4]]
        fill(output, again, layers)
    assert path.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("output", "complaint"),
    [
        (ROW, "scales by row, which ComfyUI does not read"),
        (replace(TENSOR, low_rank=4), "a low-rank branch, which"),
        (
            replace(TENSOR, spec=replace(STEPS.spec, granularity="tensor")),
            "input scales by parts of the schedule, which",
        ),
    ],
)
def test_what_comfyui_cannot_read_is_not_written_for_it(source: Path, output: LayerOutput, complaint: str) -> None:
    with pytest.raises(RequestError, match=complaint):
        planned(source, lambda plan: dict.fromkeys(plan.linears, output), "comfyui")


@pytest.mark.parametrize("name", ["plain_e4m3fn_all", "scaled_fp8_legacy", "comfy_quant_layers"])
def test_what_is_quantized_already_is_refused(name: str) -> None:
    with pytest.raises(RequestError, match=r"is FP8 already \(e4m3fn.*quantize from the 16-bit version"):
        planned(golden(f"comfyui/formats/{name}.safetensors"), lambda _: {})


def test_a_file_without_the_quantized_layers_still_loads(tmp_path: Path, source: Path) -> None:
    """No layer quantized: the copy is the source."""
    with open_source(source) as opened:
        output = plan_output(plan_part(opened.require("mmdit")), {})
        fill(output, Writer(tmp_path / "q.safetensors", output.layout, output.metadata), {})
    before, after = load_file(source), load_file(tmp_path / "q.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
