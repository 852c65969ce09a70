"""A linear layer by its rule: each part of a rule does what it says."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octavo.errors import CheckpointError, RequestError
from octavo.fp8 import Fp8Linear, dequantize, prepare
from octavo.quantize import InputStatistics, LayerRule, Observer, QuantizedLayer, apply, quantize_layer
from tests.quantize.test_rounding import correlated


def statistics_of(layer: nn.Linear, x: Tensor) -> InputStatistics:
    with Observer({"layer": layer}, {"layer": frozenset({"range", "covariance"})}) as observer:
        layer(x)
    statistics = observer.statistics("layer")
    assert statistics is not None
    return statistics


@pytest.fixture
def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(64, 48)


def output(layer: nn.Linear, quantized: QuantizedLayer, x: Tensor) -> Tensor:
    model = nn.Sequential(nn.Linear(64, 48))
    model.load_state_dict({"0.weight": layer.weight, "0.bias": layer.bias})
    apply(model, {"0": quantized})
    prepare(model, "cpu", torch.float32, backend=None if quantized.full_precision else "plain-w8a8")
    y: Tensor = model(x)
    return y


def test_each_refinement_brings_the_output_nearer(layer: nn.Linear) -> None:
    x = correlated(3000, 64)
    seen = statistics_of(layer, x)
    exact = layer(x)
    rules = [
        LayerRule(),
        LayerRule(rounding="gptq"),
        LayerRule(rounding="gptq", low_rank=16),
        LayerRule(rounding="gptq", low_rank=16, input="exact"),
    ]
    errors = []
    for rule in rules:
        quantized = quantize_layer("layer", layer.weight.detach(), layer.bias.detach(), rule, seen)
        errors.append(float((output(layer, quantized, x) - exact).norm() / exact.norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < 2**-4
    assert errors[-1] < errors[0] / 3


def test_a_plain_cast_is_the_cast(layer: nn.Linear) -> None:
    rule = LayerRule(granularity="tensor", scale="one", input="static", input_scale="one")
    assert not rule.statistics
    quantized = quantize_layer("layer", layer.weight.detach(), layer.bias.detach(), rule, None)
    assert torch.equal(dequantize(quantized.weight), layer.weight.to(torch.float8_e4m3fn).float())
    x = torch.randn(10, 64)
    expected = F.linear(x.to(torch.float8_e4m3fn).float(), dequantize(quantized.weight), layer.bias)
    assert torch.allclose(output(layer, quantized, x), expected, atol=1e-5)


def test_applied_layers_carry_all_that_their_rule_made(layer: nn.Linear) -> None:
    x = correlated(500, 64)
    rule = LayerRule(granularity="tensor", format="e5m2", input="static", low_rank=4)
    quantized = quantize_layer("layer", layer.weight.detach(), layer.bias.detach(), rule, statistics_of(layer, x))
    model = nn.Sequential(nn.Linear(64, 48))
    apply(model, {"0": quantized})
    new = model[0]
    assert isinstance(new, Fp8Linear)
    assert new.spec.format.name == "e5m2"
    assert new.spec.granularity == "tensor"
    assert not new.spec.full_precision
    assert new.input_scale is not None
    assert new.lora_down is not None
    assert new.lora_down.shape == (4, 64)
    assert new.bias is not None
    assert torch.equal(new.bias, layer.bias)


def test_scales_by_block_reach_the_layer(layer: nn.Linear) -> None:
    x = correlated(500, 64)
    rule = LayerRule(granularity="block", block=(32, 40), scale="mse", rounding="gptq", input="exact")
    quantized = quantize_layer("layer", layer.weight.detach(), layer.bias.detach(), rule, statistics_of(layer, x))
    assert quantized.weight.scale.shape == (2, 2)
    assert torch.allclose(output(layer, quantized, x), F.linear(x, dequantize(quantized.weight), layer.bias), atol=1e-4)
    plain = LayerRule(granularity="block", block=(32, 40), input="exact")
    nearest = quantize_layer("layer", layer.weight.detach(), layer.bias.detach(), plain, None)
    exact = layer(x)
    assert (output(layer, quantized, x) - exact).norm() < 0.5 * (output(layer, nearest, x) - exact).norm()


def test_weights_that_are_no_numbers_and_layers_never_met_are_refused_by_name(layer: nn.Linear) -> None:
    broken = layer.weight.detach().clone()
    broken[3, 3] = torch.nan
    with pytest.raises(CheckpointError, match=r"blocks\.7"):
        quantize_layer("blocks.7", broken, None, LayerRule(), None)
    with pytest.raises(RequestError, match=r"blocks\.7"):
        quantize_layer("blocks.7", layer.weight.detach(), None, LayerRule(rounding="gptq"), None)
