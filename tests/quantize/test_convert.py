"""Converting puts FP8 layers exactly where the table says, on meta or with weights at hand."""

import pytest
import torch
from torch import nn

from octavo.fp8 import E4M3FN, Fp8Linear, LinearSpec, Scaled, dequantize, quantize
from octavo.models import MMDiT, MMDiTConfig
from octavo.quantize import convert


def test_a_model_on_meta_is_converted_without_memory() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2**17, 2**17), nn.Linear(8, 8))
    convert(model, {"0": LinearSpec(granularity="row")})
    linear = model[0]
    assert isinstance(linear, Fp8Linear)
    assert {
        name: (tensor.dtype, tuple(tensor.shape), tensor.device.type) for name, tensor in linear.state_dict().items()
    } == {
        "q": (torch.float8_e4m3fn, (2**17, 2**17), "meta"),
        "scale": (torch.float32, (2**17, 1), "meta"),
        "bias": (torch.float32, (2**17,), "meta"),
    }


def test_layers_deep_in_a_model_are_reached_and_others_left_alone() -> None:
    torch.manual_seed(0)
    model = MMDiT(MMDiTConfig(depth=2, width=32, heads=2, context_width=16, pooled_width=16, pos_embed_size=2))
    names = ["joint_blocks.0.x_block.attn.qkv", "joint_blocks.1.x_block.adaLN_modulation.1", "context_embedder"]
    before = {name: model.get_parameter(f"{name}.weight").clone() for name in names}
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    convert(model, dict.fromkeys(names, LinearSpec(granularity="row")))
    assert {name for name, module in model.named_modules() if isinstance(module, Fp8Linear)} == set(names)
    assert {name for name, module in model.named_modules() if isinstance(module, nn.Linear)} == linears - set(names)
    for name in names:
        layer = model.get_submodule(name)
        assert isinstance(layer, Fp8Linear)
        expected = dequantize(quantize(before[name], E4M3FN, "row"))
        assert torch.equal(dequantize(Scaled(layer.q, layer.scale)), expected)


def test_only_linear_layers_can_be_converted() -> None:
    with pytest.raises(AssertionError, match="'1' is not a linear layer but a SiLU"):
        convert(nn.Sequential(nn.Linear(2, 2), nn.SiLU()), {"1": LinearSpec(format=E4M3FN)})
