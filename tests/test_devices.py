"""What a machine can do is asked when needed; what it lacks is refused with what it has; its settings come back."""

import sys

import pytest
import torch

from octavo.devices import free_bytes, out_of_memory, pick_device, pick_dtype, whole_processor
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


def test_the_switch_stays_as_long_as_anyone_needs_it_whatever_the_order() -> None:
    """Two who overlap without being nested, as two threads do: the first to leave must not take it from the second."""
    before = torch.backends.mkldnn.matmul.fp32_precision
    first, second = whole_processor(), whole_processor()
    first.__enter__()
    inside = torch.backends.mkldnn.matmul.fp32_precision
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.backends.mkldnn.matmul.fp32_precision == inside
    second.__exit__(None, None, None)
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_what_says_that_memory_is_short_is_known_from_other_errors() -> None:
    words = "[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory."), RuntimeError(words)):
        assert out_of_memory(error)
    for other in (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError(words), KeyError("memory")):
        assert not out_of_memory(other)


def test_torch_s_own_words_for_too_little_memory_are_known() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert out_of_memory(caught.value)


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


def test_a_thread_that_leaves_the_cores_to_others_keeps_them_for_others() -> None:
    """One thread's number is its own: neither the main thread's nor that of threads to come changes."""
    import threading

    from octavo.devices import compute_on_one_core

    seen: dict[str, int] = {}

    def alone() -> None:
        compute_on_one_core()
        seen["alone"] = torch.get_num_threads()

    before = torch.get_num_threads()
    for work in (alone, lambda: seen.update(later=torch.get_num_threads())):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    compute_on_one_core()  # of the main thread: nothing
    if sys.platform.startswith("linux"):
        assert seen["alone"] == 1
    assert seen["later"] == torch.get_num_threads() == before
