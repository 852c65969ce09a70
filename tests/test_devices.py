"""What a machine can do is asked when needed; what it lacks is refused with what it has; its settings come back."""

import pytest
import torch

from octavo.devices import free_bytes, pick_device, pick_dtype, whole_processor
from octavo.errors import RequestError

CPU = torch.device("cpu")


def test_products_stay_float32_and_the_switch_goes_back() -> None:
    """Float32 keeps a product of 512 terms within 1e-6 of the exact one; bfloat16 would miss by 1e-3."""
    a, b = torch.randn(2, 64, 512, generator=torch.Generator().manual_seed(1)).unbind()
    before = torch.backends.mkldnn.matmul.fp32_precision

    def multiply_and_fail() -> None:
        with whole_processor():
            inside = torch.nn.functional.linear(a, b)
            exact = a.double() @ b.double().t()
            assert (inside - exact).norm() < 1e-6 * exact.norm()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        multiply_and_fail()
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_a_device_is_taken_by_its_name() -> None:
    assert pick_device("cpu") == CPU
    assert pick_device() == pick_device("auto")


@pytest.mark.parametrize("name", ["cuda:99", "cpu:1", "xpu"])
def test_a_device_that_is_not_here_is_refused_with_one_that_is(name: str) -> None:
    with pytest.raises(RequestError, match=f"no device '{name}' that torch can use.*to use '{pick_device()}'"):
        pick_device(name)


def test_a_device_that_is_nowhere_is_refused_with_a_guess() -> None:
    with pytest.raises(RequestError, match=r"no device 'cdua'.*Did you mean 'cuda'"):
        pick_device("cdua")


def test_a_cpu_computes_in_float32_unless_told_otherwise() -> None:
    assert pick_dtype(None, CPU) == pick_dtype("auto", CPU) == torch.float32
    assert pick_dtype("bf16", CPU) == torch.bfloat16


def test_an_unknown_dtype_is_refused_with_those_there_are() -> None:
    with pytest.raises(RequestError, match=r"no dtype 'bfloat61'.*float32.*Did you mean 'bfloat16'"):
        pick_dtype("bfloat61", CPU)


def test_free_memory_is_a_plausible_number() -> None:
    free = free_bytes(CPU)
    assert free is None or 1 << 20 < free < 1 << 50
