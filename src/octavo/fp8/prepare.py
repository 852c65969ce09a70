"""Settle, once, how each FP8 layer of a model multiplies, and tell.

prepare(mmdit, device, dtype)             # after loading
print(paths(mmdit))                       # 290 of 302 linears in FP8: 290 by cpu
"""

import functools
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

import torch
from torch import nn

from octavo.errors import RequestError
from octavo.fp8.backends import Backend, Choice, Mode, Problem, choose_backend, find_backend
from octavo.fp8.linear import Fp8Linear
from octavo.fp8.matmul import BACKENDS
from octavo.fp8.scale import Scaled

MEASURED_ROWS = 1024  # of x: a picture of 512×512, or two with little text
REPEATS = 5
FP8_CAPABILITY = (8, 9)  # of the first GPUs that multiply in FP8
UNPREPARED = "plain (not prepared)"


@dataclass(frozen=True, slots=True)
class Paths:
    """How a model's linear layers multiply."""

    linears: int  # all, FP8 or not
    layers: Mapping[str, int]  # FP8 layers by the name of their backend
    reasons: Mapping[str, Mapping[str, int]]  # backend → why layers do not use it → how many

    @property
    def fp8(self) -> int:
        """Layers in FP8."""
        return sum(self.layers.values())

    def __str__(self) -> str:
        by = ", ".join(f"{count} by {name}" for name, count in self.layers.items())
        return f"{self.fp8} of {self.linears} linears in FP8" + (f": {by}" if by else "")


def prepare(
    model: nn.Module,
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    mode: Mode = "exact",
    measure: bool = False,
    backend: str | None = None,
    assume_fp8_compute: bool = False,
    backends: Sequence[Backend] = BACKENDS,
) -> Paths:
    """Give every FP8 layer of `model` its backend; call it once, when the weights are there.

    Args:
        model: loaded, on `device`; changed in place.
        device: where it runs.
        dtype: of its activations.
        mode: "exact" keeps the activations in `dtype`; "fast" lets a backend round them to 8 or 16 bits.
        measure: time the backends on each shape that occurs (once per process), and take the fastest rather than the
            first that can; a path slower than the plain definition is then never used.
        backend: the name of the one to use on every layer that it can serve; naming it permits the rounding that it
            does. Layers that it cannot serve, such as those that the file asks to keep exact, are chosen for as ever.
        assume_fp8_compute: take the user's word for it that a CUDA device can multiply in FP8; each backend that this
            admits is tried at once.
        backends: in order of preference.

    Raises:
        RequestError: no backend has that name, or no layer of the model can use it; or the model was prepared in mode
            "fast" and has given up its FP8 weights.
    """
    wanted = None if backend is None else find_backend(backends, backend)
    if wanted is not None and (why := refused(model, device, dtype, wanted, assume_fp8_compute=assume_fp8_compute)):
        raise RequestError(why)
    choices: dict[Problem, Choice] = {}
    for layer in model.modules():
        if isinstance(layer, Fp8Linear):
            assert layer.scale.device.type == torch.device(device).type, f"a layer is on {layer.scale.device}"
            told = layer.problem(dtype, mode)
            problem = assumed(told) if assume_fp8_compute else told
            if problem not in choices:
                times = seconds if measure else None
                choices[problem] = choose_backend(backends, problem, measure=times, wanted=wanted)
                if choices[problem].backend.refusal(replace(told, by_name=wanted is not None)):
                    _try(choices[problem].backend, problem)
            layer.use(choices[problem])
    return paths(model)


def refused(
    model: nn.Module,
    device: torch.device | str,
    dtype: torch.dtype,
    backend: Backend,
    *,
    assume_fp8_compute: bool = False,
) -> str | None:
    """Why no FP8 layer of `model`, which may be on meta still, could use `backend` if asked to; None if any could."""
    layers = [layer for layer in model.modules() if isinstance(layer, Fp8Linear)]
    if not layers:
        return (
            f"The backend '{backend.name}' multiplies by FP8 weights, and the model has none. "
            "Use an FP8 file of it, or --force-fp8."
        )
    problems = [replace(layer.problem(dtype), by_name=True).on(torch.device(device)) for layer in layers]
    problems = list(map(assumed, problems)) if assume_fp8_compute else problems
    reasons = Counter(backend.refusal(problem) for problem in problems)
    if None in reasons:
        return None
    told = "; ".join(f"{reason} ({count} layers)" for reason, count in reasons.items())
    return f"None of the model's {len(layers)} FP8 layers can use the backend '{backend.name}': {told}."


def assumed(problem: Problem) -> Problem:
    """The problem on the same device, if that could multiply in FP8 as GPUs of compute capability 8.9 do."""
    if problem.capability is None:
        return problem
    return replace(problem, capability=max(problem.capability, FP8_CAPABILITY))


def _try(backend: Backend, problem: Problem) -> None:
    try:
        seconds(backend, problem)
    except RuntimeError as error:
        raise RequestError(
            f"The device was said to multiply in FP8, but '{backend.name}' fails there: {error}. "
            "Leave --supports-fp8-compute out."
        ) from error


def paths(model: nn.Module) -> Paths:
    """How the linear layers of `model` multiply, for `octavo info` and logs."""
    linears, layers, reasons = 0, Counter[str](), dict[str, Counter[str]]()
    for module in model.modules():
        linears += isinstance(module, nn.Linear | Fp8Linear)
        if isinstance(module, Fp8Linear):
            layers[UNPREPARED if module.choice is None else module.choice.backend.name] += 1
            for name, reason in ({} if module.choice is None else module.choice.reasons).items():
                reasons.setdefault(name, Counter())[reason] += 1
    return Paths(linears, dict(layers.most_common()), {name: dict(why) for name, why in reasons.items()})


@functools.cache
def seconds(backend: Backend, problem: Problem) -> float:
    """Median time of `backend` for `problem` with MEASURED_ROWS rows of x, on the first device of its type."""
    device = torch.device(problem.device)
    generator = torch.Generator(device).manual_seed(0)
    # Every positive finite code occurs; subnormal ones are as rare as in weights.
    codes = torch.randint(
        problem.format.first_non_finite_code,
        (problem.N, problem.K),
        dtype=torch.uint8,
        device=device,
        generator=generator,
    )
    scale = torch.ones((problem.N, 1) if problem.granularity == "row" else (), device=device)
    weight = Scaled(codes.view(problem.format.dtype), scale)
    if backend.twin is not None:
        weight = backend.twin(weight)
    x = torch.randn(MEASURED_ROWS, problem.K, device=device, generator=generator).to(problem.dtype)
    bias = torch.zeros(problem.N, device=device, dtype=problem.dtype)
    times = []
    with torch.inference_mode():
        backend.run(x, weight, bias, None)
        for _ in range(REPEATS):
            _wait(device)
            start = time.perf_counter()
            backend.run(x, weight, bias, None)
            _wait(device)
            times.append(time.perf_counter() - start)
    return median(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
