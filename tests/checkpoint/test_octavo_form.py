"""Our own FP8 form: what is loaded is what the form says, and what is wrong with a file is told."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from octavo.checkpoint import load_mmdit
from octavo.checkpoint.describe import describe
from octavo.checkpoint.octavo_form import LayerForm, dumps, read_forms
from octavo.checkpoint.save import save_safetensors
from octavo.checkpoint.tensors import open_tensors
from octavo.errors import CheckpointError
from octavo.fp8 import Fp8Linear, Scaled, dequantize, quantize
from octavo.models import MMDiT
from tests.checkpoint.quantized import header, matrices, octavo_file
from tests.checkpoint.samples import MMDIT_PREFIX, mmdit_in_diffusers, tiny

LAYER = f"{MMDIT_PREFIX}joint_blocks.0.x_block.mlp.fc1"


def fp8_layers(model: MMDiT) -> dict[str, Fp8Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Fp8Linear)}


def output(model: MMDiT) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x, context = torch.randn(2, 16, 8, 8, generator=generator), torch.randn(2, 5, 96, generator=generator)
    return model(x, context, model.modulation(torch.tensor([900.0, 40.0]), torch.randn(2, 48, generator=generator)))


def relative_error(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def dense(values: dict[str, Tensor], path: Path) -> MMDiT:
    save_safetensors(path, values)
    return load_mmdit(path)


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("fmt", ["float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("granularity", ["tensor", "row", "block"])
def test_a_quantized_file_is_the_model_with_its_weights_dequantized(
    tmp_path: Path, granularity: str, fmt: str, rank: int
) -> None:
    """Each layer's weight is code · scale + up · down; the network's output is that of these weights."""
    tensors, form, values = octavo_file(granularity=granularity, fmt=fmt, rank=rank)
    save_safetensors(tmp_path / "q.safetensors", tensors, header(form))
    model = load_mmdit(tmp_path / "q.safetensors")
    layers = fp8_layers(model)
    assert sorted(layers) == sorted(matrices(tiny("mmdit")))
    for name, layer in layers.items():
        weight = dequantize(Scaled(layer.q, layer.scale, layer.spec.block if granularity == "block" else None))
        if rank:
            assert layer.lora_down is not None
            assert layer.lora_up is not None
            weight = weight + layer.lora_up @ layer.lora_down
        torch.testing.assert_close(weight, values[f"{name}.weight"], rtol=0, atol=1e-6)
        assert layer.spec.granularity == granularity
    assert relative_error(output(model), output(dense(values, tmp_path / "w.safetensors"))) < 2e-6


def test_branches_take_the_compute_dtype_and_ask_for_no_gradient(tmp_path: Path) -> None:
    tensors, form, _ = octavo_file(rank=2)
    save_safetensors(tmp_path / "q.safetensors", tensors, header(form))
    for layer in fp8_layers(load_mmdit(tmp_path / "q.safetensors", dtype=torch.bfloat16)).values():
        for branch in (layer.lora_down, layer.lora_up):
            assert branch is not None
            assert branch.dtype == torch.bfloat16
            assert not branch.requires_grad


def test_input_scales_and_full_precision_reach_the_layers(tmp_path: Path) -> None:
    tensors, form, _ = octavo_file(input_scale=0.5, full_precision=True)
    save_safetensors(tmp_path / "q.safetensors", tensors, header(form))
    for layer in fp8_layers(load_mmdit(tmp_path / "q.safetensors")).values():
        assert layer.input_scale == 0.5
        assert layer.spec.full_precision


def test_one_layer_may_differ_from_the_next(tmp_path: Path) -> None:
    tensors, form, _ = octavo_file(granularity="row", rank=2)
    other, other_form, _ = octavo_file(granularity="tensor")
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(LAYER)}
    tensors |= {name: tensor for name, tensor in other.items() if name.startswith(LAYER)}
    form["layers"][LAYER] = {**other_form["layers"][LAYER], "full_precision": True}
    save_safetensors(tmp_path / "q.safetensors", tensors, header(form))
    layers = fp8_layers(load_mmdit(tmp_path / "q.safetensors"))
    different = layers.pop(LAYER.removeprefix(MMDIT_PREFIX))
    assert different.spec.full_precision
    assert (different.scale.shape, different.lora_down) == ((), None)
    assert all(layer.scale.ndim == 2 and layer.lora_down is not None for layer in layers.values())
    assert not any(layer.spec.full_precision for layer in layers.values())


@pytest.mark.parametrize("block", [(128, 128), (96, 64), (1, 40), (500, 1)])
def test_blocks_of_any_size_are_read_into_the_layers(tmp_path: Path, block: tuple[int, int]) -> None:
    """Blocks at the edges are as small as what is left."""
    tensors, form, values = octavo_file(granularity="block", block=block)
    save_safetensors(tmp_path / "q.safetensors", tensors, header(form))
    for name, layer in fp8_layers(load_mmdit(tmp_path / "q.safetensors")).items():
        assert (layer.spec.granularity, layer.spec.block) == ("block", block)
        assert torch.equal(dequantize(Scaled(layer.q, layer.scale, block)), values[f"{name}.weight"])


@pytest.mark.parametrize(
    ("q", "k", "joined"),
    [
        pytest.param((64, 32), (64, 32), (64, 32), id="cut between blocks"),
        pytest.param((96, 32), (96, 32), (1, 32), id="cut inside of blocks"),
        pytest.param((64, 32), (32, 32), (1, 32), id="blocks of two heights"),
        pytest.param((64, 32), None, (1, 32), id="blocks beside one scale"),
    ],
)
def test_pieces_scaled_by_block_are_joined_without_loss(
    tmp_path: Path, q: tuple[int, int], k: tuple[int, int] | None, joined: tuple[int, int]
) -> None:
    """In diffusers' layout; blocks stay whole where all pieces begin and end with one."""
    tensors = mmdit_in_diffusers(tiny("mmdit"))
    layers, values = {}, []
    for name, block in (("to_q", q), ("to_k", k), ("to_v", q)):
        full = f"transformer_blocks.0.attn.{name}"
        weight = tensors[f"{full}.weight"].float()
        scaled = quantize(weight, granularity="block" if block else "tensor", block=block or (1, 1))
        tensors |= {f"{full}.weight": scaled.q, f"{full}.weight_scale": scaled.scale}
        values.append(dequantize(scaled))
        layers[full] = {"format": "float8_e4m3fn", "granularity": "block" if block else "tensor"}
        layers[full] |= {"block": list(block)} if block else {}  # type: ignore[dict-item]
    save_safetensors(
        tmp_path / "diffusion_pytorch_model.safetensors", tensors, header({"version": 1, "layers": layers})
    )
    layer = fp8_layers(load_mmdit(tmp_path))["joint_blocks.0.x_block.attn.qkv"]
    assert layer.spec.block == joined
    assert torch.equal(dequantize(Scaled(layer.q, layer.scale, joined)), torch.cat(values))


def test_pieces_with_blocks_of_different_widths_are_refused(tmp_path: Path) -> None:
    tensors = mmdit_in_diffusers(tiny("mmdit"))
    layers = {}
    for name, width in (("to_q", 32), ("to_k", 64), ("to_v", 32)):
        full = f"transformer_blocks.0.attn.{name}"
        scaled = quantize(tensors[f"{full}.weight"].float(), granularity="block", block=(64, width))
        tensors |= {f"{full}.weight": scaled.q, f"{full}.weight_scale": scaled.scale}
        layers[full] = {"format": "float8_e4m3fn", "granularity": "block", "block": [64, width]}
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    save_safetensors(file, tensors, header({"version": 1, "layers": layers}))
    with pytest.raises(CheckpointError, match="blocks of different widths"):
        load_mmdit(tmp_path)


def test_branches_of_split_matrices_are_joined(tmp_path: Path) -> None:
    """In diffusers' layout q, k and v have branches of their own: together they are block-diagonal, whatever the ranks.

    The halves that change places (the last block's context) keep one `down`.
    """
    generator = torch.Generator().manual_seed(2)
    tensors = mmdit_in_diffusers(tiny("mmdit"))
    values = {name: tensor.float() for name, tensor in tensors.items()}
    last = "transformer_blocks.1.norm1_context.linear"
    ranks = {"transformer_blocks.0.attn.to_q": 2, "transformer_blocks.0.attn.to_v": 3, last: 4}
    layers = {}
    for name in (*ranks, "transformer_blocks.0.attn.to_k"):
        rows, columns = tensors[f"{name}.weight"].shape
        codes = tensors[f"{name}.weight"].to(torch.float8_e4m3fn)
        tensors |= {f"{name}.weight": codes, f"{name}.weight_scale": torch.tensor(0.5)}
        values[f"{name}.weight"] = codes.float() * 0.5
        layers[name] = {"format": "float8_e4m3fn", "granularity": "tensor"}
        if rank := ranks.get(name):
            down = torch.randn(rank, columns, generator=generator).half()
            up = torch.randn(rows, rank, generator=generator).half()
            tensors |= {f"{name}.low_rank_down": down, f"{name}.low_rank_up": up}
            values[f"{name}.weight"] += up.float() @ down.float()
            layers[name]["low_rank"] = rank  # type: ignore[assignment]
    file = tmp_path / "q" / "diffusion_pytorch_model.safetensors"
    save_safetensors(file, tensors, header({"version": 1, "layers": layers}))
    model = load_mmdit(file)
    joined = model.joint_blocks[0].x_block.attn.qkv
    assert isinstance(joined, Fp8Linear)
    assert joined.lora_down is not None
    assert joined.lora_down.shape[0] == 2 + 3
    swapped = fp8_layers(model)["joint_blocks.1.context_block.adaLN_modulation.1"]
    assert swapped.lora_down is not None
    assert swapped.lora_down.shape[0] == 4
    expected = dense(values, tmp_path / "w" / "diffusion_pytorch_model.safetensors")
    assert relative_error(output(model), output(expected)) < 2e-6


def test_a_branch_of_a_matrix_that_cannot_stay_fp8_is_added_to_its_weight(tmp_path: Path) -> None:
    """Only k of q, k and v is FP8, so the joined matrix is not."""
    tensors = mmdit_in_diffusers(tiny("mmdit"))
    name = "transformer_blocks.0.attn.to_k"
    codes = tensors[f"{name}.weight"].to(torch.float8_e4m3fn)
    down, up = torch.full((1, 128), 0.5).half(), torch.arange(128).half()[:, None] / 64
    tensors |= {f"{name}.weight": codes, f"{name}.weight_scale": torch.tensor(0.5)}
    tensors |= {f"{name}.low_rank_down": down, f"{name}.low_rank_up": up}
    form = {"version": 1, "layers": {name: {"format": "float8_e4m3fn", "granularity": "tensor", "low_rank": 1}}}
    save_safetensors(tmp_path / "diffusion_pytorch_model.safetensors", tensors, header(form))
    weight = load_mmdit(tmp_path).get_parameter("joint_blocks.0.x_block.attn.qkv.weight")
    assert torch.equal(weight[128:256], codes.float() * 0.5 + up.float() @ down.float())


def test_info_tells_the_form_in_words(tmp_path: Path) -> None:
    tensors, form, _ = octavo_file(rank=2, input_scale=0.25)
    save_safetensors(tmp_path / "q.safetensors", tensors, header(form, **{"octavo.recipe": 'name = "best"\n'}))
    description = describe(tmp_path / "q.safetensors")
    (part,) = description.parts
    assert part.fp8_form == "octavo form: e4m3fn by row, low-rank 2, recipe best"
    assert part.fp8_layers == part.fp8_rowwise == part.fp8_low_rank == len(form["layers"])
    assert (part.fp8_input_scales, part.fp8_full_precision) == (len(form["layers"]), 0)
    assert "octavo.quantization" not in description.metadata


def test_what_is_written_of_layers_is_read_back(tmp_path: Path) -> None:
    forms = {
        "a": LayerForm(format="float8_e4m3fn", granularity="row", low_rank=16),
        "b": LayerForm(format="float8_e5m2", granularity="tensor", full_precision=True),
        "c": LayerForm(format="float8_e4m3fn", granularity="block", block=(128, 64)),
    }
    save_safetensors(
        tmp_path / "a.safetensors",
        {f"{name}.weight": torch.zeros(1) for name in forms},
        {"octavo.quantization": dumps(forms)},
    )
    with open_tensors(tmp_path / "a.safetensors") as file:
        assert read_forms(file) == forms


Change = Callable[[dict[str, Tensor], dict[str, Any]], object]


def layer(**fields: object) -> Change:
    return lambda _, form: form["layers"][LAYER].update(fields)


def tensor(ending: str, value: Tensor) -> Change:
    return lambda tensors, _: tensors.update({LAYER + ending: value})


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        pytest.param(lambda _, form: form.update(version=2), "of version 2; this Octavo reads version 1", id="newer"),
        pytest.param(lambda _, form: form.pop("version"), "is of version None", id="no version"),
        pytest.param(lambda _, form: form.update(layers=[]), "has no object of layers", id="layers are a list"),
        pytest.param(lambda _, form: form["layers"].update(x={}), "describes the layer 'x', which", id="absent layer"),
        pytest.param(lambda _, form: form["layers"].update({LAYER: 1}), "expected an object", id="layer is a number"),
        pytest.param(lambda _, form: form["layers"].pop(LAYER), r"fc1.low_rank_", id="a branch without description"),
        pytest.param(layer(format="nvfp4"), "has the format 'nvfp4'; known are float8_e4m3fn", id="unknown format"),
        pytest.param(layer(format="float8_e5m2"), "as float8_e5m2 but keeps it as F8_E4M3", id="another format"),
        pytest.param(layer(granularity="column"), "has the granularity 'column'; known are", id="unknown granularity"),
        pytest.param(layer(granularity="tensor"), r"needs '.*fc1.weight_scale' as F32 of shape \[\]", id="other scale"),
        pytest.param(layer(granularity="block"), "block = None; expected two whole numbers", id="no block"),
        pytest.param(layer(block=[1, 1]), "expected none, its granularity being 'row'", id="block by row"),
        pytest.param(layer(full_precision=1), "full_precision = 1; expected true or false", id="not a truth value"),
        pytest.param(layer(low_rank=-1), "low_rank = -1; expected a whole number", id="negative rank"),
        pytest.param(layer(low_rank=4), r"rank 4 at a layer of shape \[512, 128\] needs \[4, 128\]", id="other rank"),
        pytest.param(layer(low_rank=0), r"fc1.low_rank_", id="a branch that is said not to be"),
        pytest.param(
            lambda tensors, _: tensors.pop(f"{LAYER}.low_rank_up"), "lacks '.*fc1.low_rank_up'", id="half a branch"
        ),
        pytest.param(
            lambda tensors, _: tensors.pop(f"{LAYER}.weight_scale"), "holds no such tensor", id="no scale at all"
        ),
        pytest.param(layer(step_sigmas="x"), "step_sigmas = 'x'; expected a list of numbers", id="no levels"),
        pytest.param(layer(step_sigmas=[0.5]), r"2 input scales over the schedule, .* of shape \[2\]", id="one scale"),
        pytest.param(tensor(".low_rank_up", torch.zeros(512, 3)), r"needs \[512, 2\]", id="ranks that differ"),
        pytest.param(
            tensor(".low_rank_up", torch.zeros(512, 2, dtype=torch.int8)), "in 16 or 32 bits", id="branch of integers"
        ),
        pytest.param(tensor(".low_rank_down", torch.full((2, 128), torch.nan)), "has NaN", id="branch with NaN"),
        pytest.param(tensor(".weight_scale", torch.full((512, 1), -1.0)), "no finite number from 0", id="bad scale"),
        pytest.param(
            tensor(".comfy_quant", torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)),
            "both as ComfyUI and as Octavo do",
            id="two descriptions",
        ),
        pytest.param(
            lambda _, form: form["layers"].update({f"{MMDIT_PREFIX}x_embedder.proj": form["layers"][LAYER]}),
            "as float8_e4m3fn but keeps it as F16",
            id="a layer that is not quantized",
        ),
    ],
)
def test_a_description_that_is_wrong_is_refused_with_its_layer(tmp_path: Path, change: Change, complaint: str) -> None:
    tensors, form, _ = octavo_file(rank=2)
    change(tensors, form)
    save_safetensors(tmp_path / "q.safetensors", tensors, header(form))
    with pytest.raises(CheckpointError, match=complaint) as refused:
        load_mmdit(tmp_path / "q.safetensors")
    assert str(tmp_path / "q.safetensors") in str(refused.value)


@pytest.mark.parametrize("text", ["{", "[]", "3", "[" * 100_000])
def test_a_description_that_is_no_object_is_refused(tmp_path: Path, text: str) -> None:
    tensors, _, _ = octavo_file()
    save_safetensors(tmp_path / "q.safetensors", tensors, {"octavo.quantization": text})
    with pytest.raises(CheckpointError, match=r"is not (JSON|a JSON object)"):
        load_mmdit(tmp_path / "q.safetensors")
