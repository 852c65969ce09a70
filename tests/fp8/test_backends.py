"""The choice of a backend follows from data, and every refusal says why."""

from dataclasses import replace

import pytest
import torch

from octavo.fp8 import BACKENDS, E4M3FN, Problem, choose_backend
from octavo.fp8.backends import Backend, UnusableError
from octavo.fp8.formats import E5M2
from octavo.fp8.matmul import PLAIN, plain_matmul
from octavo.fp8.needs import (
    Capability,
    ComputeDtype,
    DivisibleBy,
    Formats,
    Granularities,
    Need,
    OnDevice,
    OnlyByName,
    Operator,
    Package,
    RoundsInput,
    Supported,
)

CPU = Problem(N=77, K=2050, format=E4M3FN, granularity="tensor", dtype=torch.float32, device="cpu")
H200 = replace(CPU, device="cuda", capability=(9, 0), dtype=torch.bfloat16, N=4096, K=4096)


@pytest.mark.parametrize(
    ("need", "met", "unmet", "reason"),
    [
        (OnDevice("cpu"), CPU, H200, "runs on cpu, this is cuda"),
        (Capability(8, 9), H200, CPU, "needs compute capability 8.9, this is cpu"),
        (Capability(10, 0), replace(H200, capability=(10, 1)), H200,
         "needs compute capability 10.0, this device has 9.0"),
        (DivisibleBy("K", 16), H200, CPU, "K=2050 is not divisible by 16"),
        (DivisibleBy("N", 16), H200, CPU, "N=77 is not divisible by 16"),
        (ComputeDtype((torch.bfloat16, torch.float16)), H200, CPU, "takes bfloat16 or float16, not float32"),
        (Formats((E4M3FN,)), CPU, replace(CPU, format=E5M2), "reads e4m3fn, not e5m2"),
        (OnlyByName(), replace(CPU, by_name=True), replace(CPU, mode="fast"), "is taken only when asked for by name"),
        (Granularities(("tensor",)), CPU, replace(CPU, granularity="row"), "takes scales by tensor, not by row"),
        (RoundsInput("e4m3fn"), replace(CPU, by_name=True), CPU, "rounds the input to e4m3fn: only in mode 'fp8'"),
        (RoundsInput("e4m3fn"), replace(CPU, mode="fast"), CPU, "rounds the input to e4m3fn: only in mode 'fp8'"),
        (RoundsInput("e4m3fn"), replace(CPU, mode="fp8"), CPU, "rounds the input to e4m3fn: only in mode 'fp8'"),
        (RoundsInput("int8"), replace(CPU, mode="fast"), replace(CPU, mode="fp8"),
         "rounds the input to int8: only in mode 'fast'"),
        (RoundsInput("e4m3fn"), replace(CPU, mode="fast"), replace(CPU, mode="fast", full_precision=True),
         "rounds the input to e4m3fn, where the file asks for full precision"),
    ],
)  # fmt: skip
def test_a_need_is_met_or_says_why_not(need: Need, met: Problem, unmet: Problem, reason: str) -> None:
    assert need.unmet(met) is None
    assert need.unmet(unmet) == reason


def test_what_the_machine_lacks_is_named() -> None:
    assert Package("torch").unmet(CPU) is None
    assert Package("no_such_package").unmet(CPU) == "the package no_such_package is not installed"
    assert Operator("aten.mm").unmet(CPU) is None
    assert Operator("aten.no_such_operator").unmet(CPU) == "this build of torch lacks aten.no_such_operator"
    assert Supported("a heart", lambda: False).unmet(CPU) == "this processor lacks a heart"


def test_the_first_that_can_is_chosen_and_the_others_have_a_reason() -> None:
    first = Backend(name="first", run=plain_matmul, needs=(DivisibleBy("K", 16), OnDevice("cuda")))
    second = Backend(name="second", run=plain_matmul, needs=(DivisibleBy("K", 2),))
    choice = choose_backend([first, second, PLAIN], CPU)
    assert choice.backend is second
    assert choice.reasons == {"first": "K=2050 is not divisible by 16", "plain": "'second' comes before it"}


def test_measured_the_fastest_of_those_that_can_is_chosen() -> None:
    fast = Backend(name="fast", run=plain_matmul, needs=(OnDevice("cuda"),))
    slow = Backend(name="slow", run=plain_matmul)
    times = {"fast": 1.0, "slow": 3.0, "plain": 2.0}
    choice = choose_backend([fast, slow, PLAIN], CPU, measure=lambda backend, _: times[backend.name])
    assert choice.backend is PLAIN
    assert choice.reasons == {"fast": "runs on cuda, this is cpu", "slow": "measured 1.50 times as slow as 'plain'"}


@pytest.mark.parametrize(
    ("unquantized", "chosen", "reason"),
    [
        (1.5, "rounding", "measured 2.00 times as slow as 'rounding'"),
        (0.8, "plain", "rounds the input and measured 1.25 times as slow as F.linear in float32"),
    ],
)
def test_rounding_the_input_must_beat_a_weight_that_is_not_quantized(
    unquantized: float, chosen: str, reason: str
) -> None:
    rounding = Backend(name="rounding", run=plain_matmul, needs=(RoundsInput("e4m3fn"),))
    times = {"rounding": 1.0, "plain": 2.0, "F.linear in float32": unquantized}
    choice = choose_backend(
        [rounding, PLAIN], replace(CPU, mode="fast"), measure=lambda backend, _: times[backend.name]
    )
    assert choice.backend.name == chosen
    assert list(choice.reasons.values()) == [reason]


def test_a_backend_that_fails_when_tried_is_left_out_but_not_the_definition() -> None:
    def measure(backend: Backend, _problem: Problem) -> float:
        if backend.name in broken:
            raise UnusableError("fails when tried: no such kernel")
        return 1.0

    new, broken = Backend(name="new", run=plain_matmul, needs=(OnDevice("cpu"),)), {"new"}
    choice = choose_backend([new, PLAIN], CPU, measure=measure)
    assert (choice.backend, choice.reasons) == (PLAIN, {"new": "fails when tried: no such kernel"})
    broken = {"plain"}
    with pytest.raises(UnusableError):
        choose_backend([new, PLAIN], CPU, measure=measure)


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps", "xpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_every_problem_has_a_backend_and_exact_ones_round_nothing(device: str, dtype: torch.dtype) -> None:
    problem = replace(CPU, device=device, dtype=dtype, capability=(9, 0) if device == "cuda" else None)
    choice = choose_backend(BACKENDS, problem)
    assert set(choice.reasons) == {backend.name for backend in BACKENDS} - {choice.backend.name}
    assert not any(isinstance(need, RoundsInput) for need in choice.backend.needs)
    full = replace(problem, mode="fast", full_precision=True)
    assert choose_backend(BACKENDS, full).backend is choice.backend


def test_a_problem_takes_the_capability_of_its_device() -> None:
    assert replace(CPU, device="").on(torch.device("cpu")) == CPU
