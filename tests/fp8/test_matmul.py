"""Every way to multiply gives what the definition gives, within the rounding that it declares."""

import threading

import pytest
import torch
import torch.nn.functional as F

from octavo.fp8 import E4M3FN, E5M2, Fp8Format, Granularity, Problem, Scaled, cpu
from octavo.fp8.backends import Backend
from octavo.fp8.cpu import decode
from octavo.fp8.matmul import CPU, CPU_BF16, CPU_BLAS, PLAIN
from octavo.fp8.scale import dequantize
from tests.fp8.weights import error, every_finite_code, weight

FORMATS = pytest.mark.parametrize("fmt", [E4M3FN, E5M2], ids=lambda fmt: fmt.name)
GRANULARITIES = pytest.mark.parametrize("granularity", ["tensor", "row"])
ALL_GRANULARITIES = pytest.mark.parametrize("granularity", ["tensor", "row", "block"])
ON_CPU = [PLAIN, CPU, CPU_BLAS]
SHAPES = [(1, 1, 1), (3, 17, 5), (77, 100, 33), (20, 251, 130)]  # M, K, N; the last takes several blocks


def named(backend: Backend) -> str:
    return backend.name


def skip_unless_present(backend: Backend) -> None:
    problem = Problem(N=16, K=16, format=E4M3FN, granularity="row", dtype=torch.float32, device="cpu", mode="fast")
    reason = backend.refusal(problem)
    if reason is not None:
        pytest.skip(f"{backend.name} {reason}")


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "BLOCK_BYTES", 40_000)


@FORMATS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_decoding_is_exact_on_every_finite_code(fmt: Fp8Format, dtype: torch.dtype) -> None:
    q = every_finite_code(3, 300, fmt)
    decoded = decode(q, torch.empty(3, 300, dtype=dtype)).float()
    assert torch.equal(decoded * (256 if fmt is E4M3FN else 1), q.float())
    assert torch.equal(torch.signbit(decoded), torch.signbit(q.float()))


@pytest.mark.parametrize("backend", ON_CPU, ids=named)
@FORMATS
@ALL_GRANULARITIES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float32_results_are_right_to_rounding(
    backend: Backend, fmt: Fp8Format, granularity: Granularity, shape: tuple[int, int, int]
) -> None:
    """Each weight and each of K sums is rounded to 24 bits: the error is under (K + 2) · 2⁻²⁴ of the sum of sizes."""
    M, K, N = shape
    x = torch.randn(M, K, generator=torch.Generator().manual_seed(0))
    bias = torch.linspace(-1, 1, N)
    assert error(backend, x, weight(N, K, fmt, granularity), bias) < (K + 2) * 2**-24


@pytest.mark.parametrize("backend", [CPU, CPU_BLAS], ids=named)
@FORMATS
@ALL_GRANULARITIES
def test_the_weight_that_the_cpu_multiplies_by_is_the_definitions_bit_for_bit(
    backend: Backend, fmt: Fp8Format, granularity: Granularity
) -> None:
    scaled = weight(65, 300, fmt, granularity)
    assert torch.equal(backend.run(torch.eye(300), scaled, None, None), dequantize(scaled).t())


@pytest.mark.parametrize("backend", [CPU, CPU_BLAS], ids=named)
@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 8), (torch.float16, 11)], ids=str)
def test_16_bit_inputs_are_multiplied_in_float32_and_rounded_once(
    backend: Backend, dtype: torch.dtype, bits: int
) -> None:
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(1)).to(dtype)
    scaled = weight(40, 96, granularity="row")
    y = backend.run(x, scaled, None, None)
    wide = backend.run(x.float(), scaled, None, None)
    assert torch.equal(y, wide.to(dtype))
    assert error(backend, x, scaled, None) < 2**-bits + 100 * 2**-24


@FORMATS
@GRANULARITIES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bfloat16_products_lose_half_a_step_of_bfloat16_twice(
    fmt: Fp8Format, granularity: Granularity, shape: tuple[int, int, int]
) -> None:
    """x is rounded to 8 bits, an error under 2⁻⁹ of it; so is the product; the weight is exact."""
    skip_unless_present(CPU_BF16)
    M, K, N = shape
    x = torch.randn(M, K, generator=torch.Generator().manual_seed(2))
    bias = torch.linspace(-1, 1, N)
    assert error(CPU_BF16, x, weight(N, K, fmt, granularity), bias) < 2 * 2**-9 * 1.01 + (K + 2) * 2**-24


@pytest.mark.parametrize("backend", [*ON_CPU, CPU_BF16], ids=named)
def test_no_rows_give_no_rows(backend: Backend) -> None:
    skip_unless_present(backend)
    assert backend.run(torch.empty(0, 16), weight(16, 16), None, None).shape == (0, 16)


@pytest.mark.parametrize("backend", [CPU, CPU_BLAS], ids=named)
def test_inference_mode_and_others_may_take_turns(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_memory", cpu._Memory())
    x, scaled = torch.randn(3, 32), weight(16, 32)
    with torch.inference_mode():
        inside = backend.run(x, scaled, None, None)
    assert torch.equal(backend.run(x, scaled, None, None), inside)


@pytest.mark.parametrize("backend", [CPU, CPU_BLAS], ids=named)
def test_threads_do_not_disturb_each_other(backend: Backend) -> None:
    """Each thread multiplies by a weight of its own, of another size, again and again."""
    sizes = [(40, 300), (64, 128), (7, 2000)]
    wrong: list[tuple[int, int]] = []

    def work(N: int, K: int) -> None:
        scaled = weight(N, K)
        x = torch.eye(K)
        expected = dequantize(scaled).t()
        for _ in range(20):
            if not torch.equal(backend.run(x, scaled, None, None), expected):
                wrong.append((N, K))

    threads = [threading.Thread(target=work, args=size) for size in sizes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_definition_is_linear_with_the_dequantized_weight() -> None:
    scaled = Scaled(weight(6, 4).q, torch.tensor(0.5))
    x = torch.randn(3, 4)
    bias = torch.randn(6)
    assert torch.equal(PLAIN.run(x, scaled, bias, None), F.linear(x, scaled.q.float() * 0.5, bias))
