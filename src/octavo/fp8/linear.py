"""A linear layer whose weight stays in FP8 in memory.

How it multiplies is settled once, by `prepare`; until then it follows the plain definition. Which layers become such
layers is for `quantize`, filling them from files for `checkpoint`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octavo.errors import RequestError
from octavo.fp8.backends import Backend, Choice
from octavo.fp8.formats import E4M3FN, Fp8Format
from octavo.fp8.matmul import PLAIN
from octavo.fp8.needs import Mode, Problem
from octavo.fp8.scale import BLOCK, Block, Granularity, Scaled, dequantize, scale_shape


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearSpec:
    """How one linear layer keeps its weight."""

    format: Fp8Format = E4M3FN
    granularity: Granularity = "tensor"  # of the weight's scale; a row is an output channel
    block: Block = BLOCK  # rows and columns that share a scale, where granularity is "block"
    input_scale: bool = False  # whether a calibrated scale of the input comes with it
    step_sigmas: tuple[float, ...] = ()  # falling noise levels at which that scale changes; see `steps`
    full_precision: bool = False  # never multiply in FP8: the file asks for it


class Fp8Linear(nn.Module):
    """y = x · (q · scale)ᵀ + bias, and + x · lora_downᵀ · lora_upᵀ where it has that branch.

    Attributes:
        q: [out, in] FP8 weight; on the meta device once a twin has taken its place.
        scale: [] or [out, 1] or by block, float32; the weight is q · scale.
        input_scale: [] float32, for arithmetic that rounds the input to FP8 too, or None. [G] where it changes over the
            schedule.
        groups: which of G holds now: for all rows, or a tensor [B] of each; None: the largest. See `steps`.
        tokens: [M] of an input [1, M, in] that holds the tokens of many rows: the row of each token.
        bias: [out] in the compute dtype, or None.
        lora_down, lora_up: [r, in] and [out, r] in the compute dtype, or None.
        choice: the backend with the reasons against the others, or None before `prepare`.
        twin: the form of the weight that the backend takes instead of `q`, where it has one of its own.

    `q` and the scales keep their dtypes under `.to(dtype)`, `.half()` and the like, which only move them: another dtype
    would undo the quantization. They are buffers, so that optimizers leave them alone. A layer that moves to another
    device has to be prepared again.
    """

    q: Tensor
    scale: Tensor
    input_scale: Tensor | None
    lora_down: nn.Parameter | None
    lora_up: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        spec: LinearSpec,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.spec = in_features, out_features, spec
        shape = scale_shape(out_features, in_features, spec.granularity, spec.block)
        self.register_buffer("q", torch.zeros(out_features, in_features, dtype=spec.format.dtype, device=device))
        self.register_buffer("scale", torch.ones(shape, dtype=torch.float32, device=device))
        sizes = (len(spec.step_sigmas) + 1,) if spec.step_sigmas else ()
        self.register_buffer(
            "input_scale", torch.ones(sizes, dtype=torch.float32, device=device) if spec.input_scale else None
        )
        self.bias = (
            nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype), requires_grad=False) if bias else None
        )
        self.register_parameter("lora_down", None)
        self.register_parameter("lora_up", None)
        self.groups: int | Tensor | None = None
        self.tokens: Tensor | None = None
        self.choice: Choice | None = None
        self.twin: Scaled | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] → [..., out], both in x's dtype."""
        backend = PLAIN if self.choice is None else self.choice.backend
        rows = x.reshape(-1, self.in_features)
        input_scale = self.input_scale_of(x)
        y: Tensor
        if torch.is_grad_enabled() and (rows.requires_grad or (self.bias is not None and self.bias.requires_grad)):
            y = _Multiply.apply(rows, self._own_weight(), self.bias, input_scale, backend)  # type: ignore[no-untyped-call]
        else:
            y = backend.run(rows, self.twin or self.scaled, self.bias, input_scale)
        if self.lora_down is not None and self.lora_up is not None:
            y = y + F.linear(F.linear(rows, self.lora_down.to(x.dtype)), self.lora_up.to(x.dtype))
        return y.view(*x.shape[:-1], self.out_features)

    def of_rows(self, rows: Scaled, like: Tensor) -> Tensor:
        """What `forward` gives where the input was rounded before, for a backend that has `run_scaled`.

        Nothing but that backend acts: no low-rank branch, no hooks, no gradients.

        Args:
            rows: [M, in] in the backend's form, by `input_scale_of` where that holds.
            like: [..., in], of the shape and dtype that the input would have.
        """
        assert self.choice is not None, "not prepared"
        run = self.choice.backend.run_scaled
        assert run is not None, f"'{self.choice.backend.name}' takes no rows in 8 bits"
        y = run(rows, self.twin or self.scaled, self.bias, like.dtype)
        return y.view(*like.shape[:-1], self.out_features)

    def input_scale_of(self, x: Tensor) -> Tensor | None:
        """The calibrated scale for `x` [B, ..., in]: [], or [rows, 1] where parts of the schedule are mixed."""
        scale, groups = self.input_scale, self.groups
        if scale is None or not scale.ndim:
            return scale
        if groups is None:
            return scale.amax()
        if isinstance(groups, int):
            return scale[groups]
        rows = x.numel() // self.in_features
        if self.tokens is not None and x.shape[0] == 1:  # more than one row, of unlike lengths, one after the other
            return scale[groups[self.tokens]].view(rows, 1)
        return scale[groups].repeat_interleave(rows // len(groups)).view(rows, 1)

    @property
    def scaled(self) -> Scaled:
        """The weight."""
        return Scaled(self.q, self.scale, self.spec.block if self.spec.granularity == "block" else None)

    def dequantized(self) -> Tensor:
        """The weight [out, in] in float32, the low-rank branch included.

        Raises:
            RequestError: it was given up for another form.
        """
        weight = dequantize(self._own_weight())
        if self.lora_down is not None and self.lora_up is not None:
            weight = weight + self.lora_up.detach().float() @ self.lora_down.detach().float()
        return weight

    def problem(self, dtype: torch.dtype, mode: Mode = "exact", device: torch.device | None = None) -> Problem:
        """What a backend would have to do for inputs of `dtype` on `device`, or where the layer is now."""
        return Problem(
            N=self.out_features,
            K=self.in_features,
            format=self.spec.format,
            granularity=self.spec.granularity,
            block=self.spec.block if self.spec.granularity == "block" else None,
            dtype=dtype,
            device="",
            full_precision=self.spec.full_precision,
            mode=mode,
        ).on(device or self.scale.device)

    def use(self, choice: Choice, device: torch.device | str | None = None) -> None:
        """Multiply by this backend from now on.

        A backend with a form of its own for the weight gets that made, and `q` gives its memory back.

        Args:
            device: where that form is made, if not where the weight is; it is kept where the weight is.

        Raises:
            RequestError: `q` was given up before, for a backend that is no longer wanted.
        """
        if self.twin is not None:
            if self.choice is not None and self.choice.backend is choice.backend:
                return
            raise RequestError(_given_up(self.choice))
        if choice.backend.twin is not None:
            weight, home = self.scaled, self.q.device
            there = home if device is None else torch.device(device)
            made = choice.backend.twin(Scaled(weight.q.to(there), weight.scale.to(there), weight.block))
            # What a kernel has packed for itself cannot be moved, nor need it be: only CPUs have such.
            stays = made.q.layout is not torch.strided
            self.twin = made if stays else Scaled(made.q.to(home), made.scale.to(home), made.block)
            self.q = self.q.to("meta")
        self.choice = choice

    @property
    def given_up(self) -> bool:
        """Whether another form has taken the place of the FP8 weight for good."""
        return self.twin is not None

    def set_low_rank(self, down: Tensor | None, up: Tensor | None) -> None:
        """Add x · downᵀ · upᵀ to the output; a LoRA's strength is part of `up`, and several lie side by side in r.

        Args:
            down: [r, in], or None to take the branch off.
            up: [out, r], or None.
        """
        if down is not None and up is not None:
            assert down.shape[1] == self.in_features, f"down is {list(down.shape)}, needed [r, {self.in_features}]"
            expected = (self.out_features, down.shape[0])
            assert up.shape == expected, f"up is {list(up.shape)}, needed {list(expected)}"
        self.lora_down = None if down is None else nn.Parameter(down, requires_grad=down.requires_grad)
        self.lora_up = None if up is None else nn.Parameter(up, requires_grad=up.requires_grad)

    def extra_repr(self) -> str:
        path = "" if self.choice is None else f", multiplied by {self.choice.backend.name}"
        size = " of {}×{}".format(*self.spec.block) if self.spec.granularity == "block" else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self.spec.format.name} by {self.spec.granularity}{size}{path}"
        )

    def _own_weight(self) -> Scaled:
        if self.twin is not None:
            raise RequestError(_given_up(self.choice))
        return self.scaled

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> Self:
        kept = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        device = self.scale.device
        if self.twin is not None:
            self._buffers["q"] = None  # what has no memory cannot be moved
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        moved = self.scale.device != device
        if self.twin is not None:
            self.q = kept.pop("q")
            if moved:
                raise RequestError(_given_up(self.choice))
        for name, before in kept.items():
            after: Tensor = getattr(self, name)
            if after.dtype != before.dtype:
                setattr(self, name, before.to(after.device))
        if moved:
            self.choice = None
        return self


class _Multiply(torch.autograd.Function):
    """Any backend forwards; the plain definition's gradient backwards, straight through whatever a backend rounds."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Scaled, bias: Tensor | None, input_scale: Tensor | None, backend: Backend
    ) -> Tensor:
        ctx.weight, ctx.bias_dtype = weight, None if bias is None else bias.dtype
        return backend.run(x, weight, bias, input_scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, Tensor | None, None, None]:
        (gradient,) = gradients
        of_x, _, of_bias, _, _ = ctx.needs_input_grad
        return (
            gradient @ dequantize(ctx.weight, gradient.dtype) if of_x else None,
            None,
            gradient.sum(0).to(ctx.bias_dtype) if of_bias else None,
            None,
            None,
        )


def _given_up(choice: Choice | None) -> str:
    name = "another" if choice is None else f"the '{choice.backend.name}'"
    return (
        f"The FP8 weights were given up for {name} form, which can neither be moved nor trained nor changed back. "
        "Load the model again, in mode 'exact' if it shall be more than run."
    )
