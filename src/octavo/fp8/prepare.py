"""Settle, once, how each FP8 layer of a model multiplies, and tell.

prepare(mmdit, device, dtype)             # after loading
print(paths(mmdit))                       # 290 of 302 linears in FP8: 290 by cpu
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from octavo.devices import trim_memory
from octavo.errors import RequestError
from octavo.fp8 import steps
from octavo.fp8.backends import Backend, Choice, UnusableError, choose_backend, find_backend
from octavo.fp8.linear import Fp8Linear
from octavo.fp8.matmul import BACKENDS
from octavo.fp8.needs import TYPICAL_ROWS, Mode, Problem
from octavo.fp8.timing import Timings, seconds

FP8_CAPABILITY = (8, 9)  # of the first GPUs that multiply in FP8
TRIM_AFTER = 16 << 20  # bytes of weights that were remade in another form
UNPREPARED = "plain (not prepared)"


@dataclass(frozen=True, slots=True)
class Group:
    """FP8 layers of one name, numbers aside, that multiply alike."""

    name: str  # with * for numbers
    out_features: int
    in_features: int
    backend: str


@dataclass(frozen=True, slots=True)
class Paths:
    """How a model's linear layers multiply."""

    linears: int  # all, FP8 or not
    layers: Mapping[str, int]  # FP8 layers by the name of their backend
    reasons: Mapping[str, Mapping[str, int]]  # backend → why layers do not use it → how many
    groups: Mapping[Group, int] = field(default_factory=dict)  # how many layers

    @property
    def fp8(self) -> int:
        """Layers in FP8."""
        return sum(self.layers.values())

    def __str__(self) -> str:
        by = ", ".join(f"{count} by {name}" for name, count in self.layers.items())
        return f"{self.fp8} of {self.linears} linears in FP8" + (f": {by}" if by else "")

    @property
    def details(self) -> list[str]:
        """A line for each group of layers, and for each reason against backends."""
        taken = [
            f"{group.name} [{group.out_features}, {group.in_features}], {count}: {group.backend}"
            for group, count in self.groups.items()
        ]
        alike: dict[tuple[str, int], list[str]] = {}
        for name, why in self.reasons.items():
            for reason, count in why.items():
                alike.setdefault((reason, count), []).append(name)
        refused = [f"not {', '.join(names)} for {count}: {reason}" for (reason, count), names in alike.items()]
        return taken + refused


def prepare(
    model: nn.Module,
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    mode: Mode = "exact",
    measure: bool | None = None,
    rows: Callable[[str], int] = lambda _name: TYPICAL_ROWS,
    backend: str | None = None,
    assume_fp8_compute: bool = False,
    backends: Sequence[Backend] = BACKENDS,
) -> Paths:
    """Give every FP8 layer of `model` its backend; call it once, when the weights are there.

    Args:
        model: loaded, on `device` or in host memory, from where its weights will come when they are needed; changed in
            place.
        device: where it runs.
        dtype: of its activations.
        mode: "exact" keeps the activations in `dtype`; "fp8" lets a backend round them to FP8 where that is how the
            device multiplies fast; "fast" lets it round them to 8 or 16 bits of any kind.
        measure: time the backends on each shape that occurs and take the best, see `choose_backend`; times are kept on
            disk (see `timing`). None: on CUDA devices, which differ from one another. On CPUs the order of `backends`
            is known to be that of speed, so that measuring them, seconds of work amid the noise of other programs,
            could only find another result by mistake.
        rows: of a layer's input, by the layer's name, where it is measured.
        backend: the name of the one to use on every layer that it can serve; naming it permits the rounding that it
            does. Layers that it cannot serve, such as those that the file asks to keep exact, are chosen for as ever.
        assume_fp8_compute: take the user's word for it that a CUDA device can multiply in FP8; each backend that this
            admits is tried at once.
        backends: in order of preference.

    Raises:
        RequestError: no backend has that name, or no layer of the model can use it; or the model was prepared in mode
            "fast" and has given up its FP8 weights.
    """
    steps.forget(model)
    wanted = None if backend is None else find_backend(backends, backend)
    if wanted is not None and (why := refused(model, device, dtype, wanted, assume_fp8_compute=assume_fp8_compute)):
        raise RequestError(why)
    measure = torch.device(device).type == "cuda" if measure is None else measure
    timings = Timings() if measure else None
    choices, remade = dict[Problem, Choice](), 0
    for name, layer in model.named_modules():
        if isinstance(layer, Fp8Linear):
            assert layer.scale.device.type in (torch.device(device).type, "cpu"), f"a layer is on {layer.scale.device}"
            told = replace(layer.problem(dtype, mode, torch.device(device)), rows=rows(name))
            problem = assumed(told) if assume_fp8_compute else told
            if problem not in choices:
                choices[problem] = choose_backend(backends, problem, measure=timings, wanted=wanted)
                chosen = choices[problem].backend
                if problem != told and chosen.refusal(replace(told, by_name=wanted is chosen)):
                    _try(chosen, problem)
            layer.use(choices[problem], device)
            if layer.given_up:
                remade += layer.q.numel()
                if remade >= TRIM_AFTER:
                    trim_memory()
                    remade = 0
    if remade:
        trim_memory()
    if timings is not None:
        timings.save()
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
    """See that a backend runs which only the user's word has admitted."""
    try:
        seconds(backend, problem)
    except UnusableError as error:
        raise RequestError(
            f"The device was said to multiply in FP8, but '{backend.name}' {error}. Leave --supports-fp8-compute out."
        ) from error


def paths(model: nn.Module) -> Paths:
    """How the linear layers of `model` multiply, for `octavo info` and logs."""
    linears, layers, reasons, groups = 0, Counter[str](), dict[str, Counter[str]](), Counter[Group]()
    for name, module in model.named_modules():
        linears += isinstance(module, nn.Linear | Fp8Linear)
        if isinstance(module, Fp8Linear):
            backend = UNPREPARED if module.choice is None else module.choice.backend.name
            layers[backend] += 1
            alike = re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name)
            groups[Group(alike, module.out_features, module.in_features, backend)] += 1
            for other, reason in ({} if module.choice is None else module.choice.reasons).items():
                reasons.setdefault(other, Counter())[reason] += 1
    counted = {name: dict(why) for name, why in reasons.items()}
    return Paths(linears, dict(layers.most_common()), counted, dict(groups))
