"""An FP8 linear is F.linear with the dequantized weight, and stays FP8 whatever is done to the model around it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from octavo.fp8 import E5M2, Fp8Linear, LinearSpec, Scaled, dequantize, prepare, quantize
from octavo.quantize import convert

SPECS = [
    LinearSpec(),
    LinearSpec(granularity="row"),
    LinearSpec(granularity="block", block=(2, 4)),
    LinearSpec(format=E5M2, input_scale=True, full_precision=True),
]


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.SiLU(), nn.Linear(5, 3, bias=False))


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_output_is_that_of_the_dequantized_weight(spec: LinearSpec, dtype: torch.dtype) -> None:
    model = small_model()
    plain = model[0]
    assert isinstance(plain, nn.Linear)
    expected_weight = dequantize(quantize(plain.weight, spec.format, spec.granularity, block=spec.block), dtype)
    convert(model, {"0": spec})
    linear = model[0]
    assert isinstance(linear, Fp8Linear)
    x = torch.randn(2, 4, 6).to(dtype)
    out = linear(x)
    assert out.dtype == dtype
    assert torch.equal(out, F.linear(x, expected_weight, plain.bias.to(dtype)))
    assert isinstance(model[2], nn.Linear)


@pytest.mark.parametrize("change", [nn.Module.half, nn.Module.bfloat16, nn.Module.double], ids=lambda f: f.__name__)
def test_changing_the_models_dtype_leaves_codes_and_scales_alone(change: object) -> None:
    model = small_model()
    convert(model, {"0": LinearSpec(input_scale=True)})
    linear = model[0]
    assert isinstance(linear, Fp8Linear)
    before = {name: tensor.clone() for name, tensor in linear.state_dict().items()}
    change(model)  # type: ignore[operator]
    assert linear.bias is not None
    assert linear.bias.dtype == model[2].weight.dtype != torch.float32
    for name in ("q", "scale", "input_scale"):
        after = linear.state_dict()[name]
        assert after.dtype == before[name].dtype
        assert torch.equal(after.float(), before[name].float())


def test_moving_to_another_device_moves_everything() -> None:
    model = small_model()
    convert(model, {"0": LinearSpec(granularity="row")})
    model.to("meta", torch.bfloat16)
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}
    assert model.state_dict()["0.q"].dtype == torch.float8_e4m3fn


@pytest.mark.gradients
def test_gradients_reach_the_input() -> None:
    model = small_model()
    convert(model, {"0": LinearSpec()})
    linear = model[0]
    assert isinstance(linear, Fp8Linear)
    x = torch.randn(3, 6, requires_grad=True)
    linear(x).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, dequantize(Scaled(linear.q, linear.scale)).sum(0).expand(3, 6))


def test_it_tells_what_it_is() -> None:
    model = small_model()
    convert(model, {"0": LinearSpec(granularity="row")})
    assert "Fp8Linear(in_features=6, out_features=5, bias=True, e4m3fn by row)" in repr(model)
    model = small_model()
    convert(model, {"0": LinearSpec(granularity="block")})
    assert "e4m3fn by block of 128×128)" in repr(model)


@pytest.mark.gradients
@pytest.mark.parametrize("prepared", [False, True])
def test_a_low_rank_branch_adds_its_product_and_can_be_trained_and_taken_off(prepared: bool) -> None:
    model = small_model()
    convert(model, {"0": LinearSpec()})
    linear = model[0]
    assert isinstance(linear, Fp8Linear)
    if prepared:
        prepare(model, "cpu", torch.float32)
    x = torch.randn(2, 4, 6)
    before = linear(x)
    down, up = torch.randn(3, 6), torch.randn(5, 3)
    linear.set_low_rank(down.requires_grad_(), up)
    assert torch.allclose(linear(x), before + x @ down.t() @ up.t(), atol=1e-5)
    linear(x).sum().backward()
    assert linear.lora_down is not None
    assert linear.lora_down.grad is not None
    assert torch.allclose(linear.lora_down.grad, up.sum(0)[:, None] * x.sum((0, 1)), atol=1e-4)
    linear.set_low_rank(None, None)
    assert torch.equal(linear(x), before)
    with pytest.raises(AssertionError, match=r"up is \[5, 2\], needed \[5, 3\]"):
        linear.set_low_rank(down, torch.randn(5, 2))
