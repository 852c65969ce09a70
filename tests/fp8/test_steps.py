"""Input scales that follow the schedule."""

import pytest
import torch
from torch import nn

from octavo.fp8 import Fp8Linear, LinearSpec, at_sigmas, prepare, quantize, step_group
from octavo.fp8.matmul import plain_w8a8
from octavo.fp8.scale import dequantize, quantize_input

LEVELS = (0.8, 0.4)
SCALES = torch.tensor([2.0**-5, 2.0**-8, 2.0**-2])


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    layer = Fp8Linear(32, 16, LinearSpec(granularity="row", input_scale=True, step_sigmas=LEVELS))
    weight = quantize(torch.randn(16, 32), granularity="row")
    layer.q, layer.scale, layer.input_scale = weight.q, weight.scale, SCALES.clone()
    model = nn.Sequential(layer)
    prepare(model, "cpu", torch.float32, backend="plain-w8a8")
    return model


def definition(layer: Fp8Linear, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    assert layer.bias is not None
    return plain_w8a8(x.reshape(-1, 32), layer.scaled, layer.bias, scale).view(*x.shape[:-1], 16)


@pytest.mark.parametrize(("sigma", "group"), [(1.0, 0), (0.81, 0), (0.8, 1), (0.5, 1), (0.4, 2), (0.0, 2)])
def test_levels_part_the_schedule_where_they_are_reached(sigma: float, group: int) -> None:
    assert step_group(sigma, LEVELS) == group


def test_every_row_is_rounded_by_the_scale_of_its_own_noise_level(model: nn.Sequential) -> None:
    x = torch.randn(3, 5, 32)
    layer = model[0]
    assert isinstance(layer, Fp8Linear)
    with at_sigmas(model, [0.1, 1.0, 0.5]):
        y = model(x)
    for row, group in enumerate((2, 0, 1)):
        torch.testing.assert_close(y[row], definition(layer, x[row], SCALES[group]), rtol=0, atol=1e-6)
    with at_sigmas(model, [0.5, 0.5, 0.6]):
        assert torch.equal(model(x), definition(layer, x, SCALES[1]))


def test_tokens_of_many_rows_one_after_the_other_are_rounded_by_their_rows_scales(model: nn.Sequential) -> None:
    layer = model[0]
    assert isinstance(layer, Fp8Linear)
    packed, image = torch.randn(1, 7, 32), torch.randn(3, 5, 32)
    rows = torch.tensor([0, 0, 1, 2, 2, 2, 2])
    with at_sigmas(model, [0.1, 1.0, 0.5], tokens=rows):
        y, of_image = model(packed), model(image)
    for row, group in enumerate((2, 0, 1)):
        mine = rows == row
        torch.testing.assert_close(y[0, mine], definition(layer, packed[0, mine], SCALES[group]), rtol=0, atol=1e-5)
        torch.testing.assert_close(of_image[row], definition(layer, image[row], SCALES[group]), rtol=0, atol=1e-5)


def test_where_nothing_is_said_the_largest_scale_holds(model: nn.Sequential) -> None:
    x = torch.randn(2, 5, 32)
    layer = model[0]
    assert isinstance(layer, Fp8Linear)
    with at_sigmas(model, [1.0, 1.0]):
        pass
    assert torch.equal(model(x), definition(layer, x, SCALES.amax()))


def test_layers_that_are_exchanged_are_found_after_prepare(model: nn.Sequential) -> None:
    with at_sigmas(model, [1.0]):
        pass
    model[0] = nn.Linear(32, 16)
    prepare(model, "cpu", torch.float32)
    with at_sigmas(model, [1.0]):
        assert model(torch.zeros(1, 32)).shape == (1, 16)


def test_the_kernel_rounds_rows_by_scales_of_their_own() -> None:
    pytest.importorskip("triton")
    from octavo.fp8.kernels.quantize import quantize_rows

    x, scales = torch.randn(7, 40), torch.rand(7, 1) + 0.01
    rounded = quantize_rows(x, scales)
    assert torch.equal(rounded.scale, scales)
    assert torch.equal(dequantize(rounded), dequantize(quantize_input(x, scales)))
