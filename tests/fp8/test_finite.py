"""NaN and infinity are noticed, and the layer that made them is named."""

import pytest
import torch
from torch import nn

from octavo.fp8 import LinearSpec, all_finite, prepare, watch
from octavo.quantize import convert


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_one_bad_number_is_enough(bad: float) -> None:
    x = torch.full((3, 4), 6e4, dtype=torch.float16)  # its sum is beyond float16
    assert all_finite(x)
    x[1, 2] = bad
    assert not all_finite(x)


class Overflow(nn.Module):
    """Squares until float32 has no room."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * 1e30) ** 2


def test_the_first_layer_at_fault_is_named_with_its_input() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Identity(), Overflow()), nn.Linear(2, 2))
    with watch(model) as culprit:
        model(torch.ones(1, 2))
    assert culprit.name == "1.1"
    assert str(culprit).startswith("The first NaN or infinity left '1.1' (Overflow); its largest input was ")
    assert not any(module._forward_hooks for module in model.modules())


def test_an_fp8_layer_tells_its_path() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    convert(model, {"0": LinearSpec()})
    prepare(model, "cpu", torch.float32)
    with watch(model) as culprit, torch.no_grad():
        model(torch.tensor([[float("inf"), 0, 0, 0]]))
    assert "left '0' (Fp8Linear on the path 'cpu" in str(culprit)
    assert culprit.largest_input == float("inf")


def test_without_a_culprit_it_says_so_and_hooks_leave_after_an_error() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    with watch(model) as culprit:
        model(torch.ones(1, 2))
    assert culprit.name is None
    assert "between the layers" in str(culprit)
    with pytest.raises(RuntimeError), watch(model):
        model(torch.ones(1, 3))
    assert not model[0]._forward_hooks
