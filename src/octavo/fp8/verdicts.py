"""Whether a fused step serves a layer, and whether it is faster than the plain one: what `fused` goes by."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octavo.fp8.backends import Backend, Choice, ScaledMatmul, UnusableError
from octavo.fp8.formats import E4M3FN
from octavo.fp8.linear import Fp8Linear
from octavo.fp8.matmul import FLOATS
from octavo.fp8.modulate import EPS, Kernels, Stream, Taker
from octavo.fp8.needs import TYPICAL_ROWS, Capability, ComputeDtype, Need, OnDevice, Package, Problem
from octavo.fp8.scale import Form, Scaled
from octavo.fp8.timing import Timings

Step = Literal["modulated", "residual_modulated", "gelu", "residual", "heads"]

# Which step makes a layer's input, by the end of the layer's name.
STEPS: Mapping[str, Step] = {
    "attn.qkv": "modulated",
    "attn2.qkv": "modulated",
    "mlp.fc1": "residual_modulated",
    "mlp.fc2": "gelu",
}
NEEDS: tuple[Need, ...] = (OnDevice("cuda"), Capability(7, 5), ComputeDtype(FLOATS), Package("triton"))
HEAD = 64  # numbers of a head in SD3.5
TRIAL_NUMBERS = 1 << 25  # of the input of a step that is timed on a GPU
LONGEST_ROW = 16384  # of a norm: what one program of `kernels.modulate` holds


class PlainSteps(Protocol):
    """`models.ops.Ops`: the definitions, and what they are asked."""

    def modulated(self, x: Tensor, *targets: Any) -> list[Tensor]: ...

    def residual(self, x: Tensor, gate: Tensor, branch: Tensor) -> Tensor: ...

    def residual_modulated(self, x: Tensor, gate: Tensor, branch: Tensor, target: Any) -> tuple[Tensor, Tensor]: ...

    def gelu(self, x: Tensor, linear: Any) -> Tensor: ...

    def heads(self, *streams: Any) -> Any: ...

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Verdict:
    """How the input of one layer is made."""

    step: Step
    bits: Literal["8 bits", "16 bits", "plain"]
    choice: Choice | None = None  # the layer's, when this was decided
    form: Form | None = None  # of 8 bits
    reason: str | None = None  # why not in 8 bits


def unfit(device: torch.device, dtype: torch.dtype, needs: tuple[Need, ...] = NEEDS) -> str | None:
    """Why no step can be fused on `device` for activations of `dtype`; None where steps can."""
    return _unmet(step_problem(16, dtype, device), needs)


@dataclass(frozen=True, slots=True)
class Judge:
    """Says of steps whether they are fused."""

    plain: PlainSteps
    kernels: Kernels | None
    device: torch.device
    dtype: torch.dtype
    timings: Timings | None
    unfit: str | None  # why none can be

    def layer(self, step: Step, layer: nn.Linear | Fp8Linear, rows: int) -> Verdict:
        reason = self.unfit
        if reason is None and step != "gelu" and layer.in_features > LONGEST_ROW:
            reason = f"its rows of {layer.in_features} are longer than {LONGEST_ROW}"
        if reason is not None:
            return Verdict(step, "plain", reason=reason)
        if not isinstance(layer, Fp8Linear):
            reason = "its weight is not in FP8"
        elif layer.choice is None or layer.choice.backend.form is None:
            name = "plain" if layer.choice is None else layer.choice.backend.name
            reason = f"'{name}' takes its input in 16 bits"
        else:
            backend, problem = layer.choice.backend, replace(layer.problem(self.dtype, device=self.device), rows=rows)
            reason = self._slower(step, problem, backend)
            if reason is None:
                return Verdict(step, "8 bits", layer.choice, backend.form)
        if step == "gelu":
            return Verdict(step, "plain", reason=reason)
        slower = self.alone(step, layer.in_features, rows)
        return Verdict(step, "16 bits" if slower is None else "plain", reason=reason if slower is None else slower)

    def alone(self, step: Step, width: int, rows: int = TYPICAL_ROWS) -> str | None:
        """Why a step that ends in 16 bits is not fused; None where it is."""
        if self.unfit is not None:
            return self.unfit
        return self._slower(step, replace(step_problem(width, self.dtype, self.device), rows=rows), None)

    def _slower(self, step: Step, problem: Problem, backend: Backend | None) -> str | None:
        if self.timings is None or self.kernels is None:
            return None
        # So much work that the device takes longer for it than Python for its launch, which graphs make vanish.
        problem = replace(problem, rows=_trial_rows(problem))
        by = "16 bits" if backend is None else backend.name
        twin = None if backend is None else backend.twin
        ours = Backend(name=f"{step}, fused, {by}", run=_fused_trial(step, self.kernels, backend), twin=twin)
        theirs = Backend(name=f"{step}, plain, {by}", run=_plain_trial(step, self.plain, backend), twin=twin)
        try:
            times = self.timings(ours, problem), self.timings(theirs, problem)
        except UnusableError as error:
            return str(error)
        return None if times[0] < times[1] else f"measured {times[0] / times[1]:.2f} times as slow as the plain step"


def step_problem(width: int, dtype: torch.dtype, device: torch.device) -> Problem:
    """A step of this width by itself, as times are kept by problems; its weight is a dummy."""
    return Problem(N=16, K=width, format=E4M3FN, granularity="tensor", dtype=dtype, device="").on(device)


def _unmet(problem: Problem, needs: tuple[Need, ...]) -> str | None:
    return next((reason for need in needs if (reason := need.unmet(problem)) is not None), None)


def _trial_rows(problem: Problem) -> int:
    return max(problem.rows, TRIAL_NUMBERS // problem.K) if problem.device == "cuda" else problem.rows


def _fused_trial(step: Step, kernels: Kernels, backend: Backend | None) -> ScaledMatmul:
    """The fused step and the product after it, as `Timings` runs one; without a backend the step alone."""
    form = None if backend is None else backend.form

    def run(x: Tensor, weight: Scaled, bias: Tensor | None, input_scale: Tensor | None) -> Tensor:
        tokens, vector = x[None], x[:1]
        if step == "heads":
            q, _, _ = kernels.heads(Stream(_as_qkv(x), *_trial_heads(x)))
            return q
        if step == "residual":
            return kernels.residual(tokens, vector, tokens)
        if step == "gelu":
            assert form is not None, "GELU alone is one pass already"
            rows: Scaled | Tensor = kernels.gelu(x, form, input_scale)
        elif step == "modulated":
            (rows,) = kernels.modulated(tokens, Taker(vector, vector, form, input_scale))
        else:
            _, rows = kernels.residual_modulated(tokens, vector, tokens, Taker(vector, vector, form, input_scale))
        if isinstance(rows, Tensor):
            return rows
        assert backend is not None
        assert backend.run_scaled is not None
        return backend.run_scaled(rows, weight, bias, x.dtype)

    return run


def _plain_trial(step: Step, plain: PlainSteps, backend: Backend | None) -> ScaledMatmul:
    """The same by the plain step."""

    def run(x: Tensor, weight: Scaled, bias: Tensor | None, input_scale: Tensor | None) -> Tensor:
        def layer(y: Tensor) -> Tensor:
            return y if backend is None else backend.run(y.view(x.shape), weight, bias, input_scale)

        tokens, vector = x[None], x[:1]
        if step == "heads":
            count, of_q, of_k, eps = _trial_heads(x)
            attn = SimpleNamespace(heads=count, ln_q=_norm_of(of_q, eps), ln_k=_norm_of(of_k, eps))
            result: Tensor = plain.heads((attn, _as_qkv(x)))[0]
            return result
        if step == "residual":
            return plain.residual(tokens, vector, tokens)
        if step == "gelu":
            return plain.gelu(tokens, layer)
        if step == "modulated":
            return plain.modulated(tokens, (layer, vector, vector))[0]
        return plain.residual_modulated(tokens, vector, tokens, (layer, vector, vector))[1]

    return run


def _as_qkv(x: Tensor) -> Tensor:
    """Rows [M, D] as what a qkv layer gave, [1, M / 3, 3 · D]."""
    return x[: len(x) // 3 * 3].view(1, -1, 3 * x.shape[1])


def _trial_heads(x: Tensor) -> tuple[int, Tensor, Tensor, float]:
    """Heads of 64 numbers, as SD3.5 has them, and norms of queries and keys, whose weights do not matter."""
    width = HEAD if x.shape[1] % HEAD == 0 else x.shape[1]
    return x.shape[1] // width, x[0, :width], x[0, :width], EPS


def _norm_of(weight: Tensor, eps: float) -> Callable[[Tensor], Tensor]:
    return lambda x: F.rms_norm(x, x.shape[-1:], weight, eps)
