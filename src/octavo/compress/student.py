"""A quantized model made trainable: what an FP8 layer can still change once its codes are settled.

Each FP8 layer computes

    y = scale · (round(x) · qᵀ) + bias + x · downᵀ · upᵀ

with its scale (one for each output channel), its bias and its low-rank branch open to training. Linears that stayed in
16 bits open their bias. The input is rounded as GPUs round it, see `fp8.matmul.plain_w8a8`, and the gradient passes
straight through the rounding (Bengio et al. 2013, arXiv 1308.3432).

What is trained are changes, in units of what they change: of the scale itself, of the root mean square of the layer's
output or input. One step size then suits channels that are a thousand times apart, as they are in large models.

M rows, N outputs, K inputs, r rank.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octavo.fp8 import E4M3FN, Fp8Linear, LinearSpec
from octavo.fp8.scale import quantize_input

Branch = tuple[Tensor, Tensor]  # down [r, K] and up [N, r]
SMALLEST = 1e-6  # root mean square of a channel that is taken for silent


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What training made of one layer, in the dtypes of a file."""

    scale: Tensor | None  # [N, 1] float32; None for a layer in 16 bits
    bias: Tensor | None  # [N] 16 bits
    low_rank: Branch | None  # 16 bits


class StudentLinear(nn.Module):
    """A linear layer in training; takes the place of `layer`, whose own tensors stay as they are.

    Attributes:
        changes: the parameters, float32 zeros at first, by kind: scale [N], bias [N], down [r, K], up [N, r].
        input_size, output_size: [K] and [N], the units of `changes`; see `measured`.
    """

    def __init__(self, layer: Fp8Linear | nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.device = layer.scale.device if isinstance(layer, Fp8Linear) else layer.weight.device
        self.branch: Branch | None = None
        self.changes = nn.ParameterDict()
        self.input_size = torch.ones(self.in_features, device=self.device)
        self.output_size = torch.ones(self.out_features, device=self.device)
        if layer.bias is not None:
            self._open("bias", (self.out_features,))
        if isinstance(layer, Fp8Linear):
            self._open("scale", (self.out_features,))
            if layer.lora_down is not None and layer.lora_up is not None:
                self.add_branch((layer.lora_down.detach(), layer.lora_up.detach()))

    def add_branch(self, branch: Branch) -> None:
        """Open a low-rank branch that begins as `branch`."""
        down, up = branch
        self.branch = (down.to(self.device, torch.float32), up.to(self.device, torch.float32))
        self._open("down", tuple(down.shape))
        self._open("up", tuple(up.shape))

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] → [..., N], both in x's dtype, float32 or bfloat16: a product with bare codes overflows float16."""
        layer = self.layer
        # Codes are numbers of bfloat16; scales and bias act in float32: bfloat16 does not see changes below 0.4 %.
        if isinstance(layer, Fp8Linear):
            codes, rows = (x, 1.0) if layer.spec.full_precision else _Rounded.apply(x, layer.input_scale_of(x))  # type: ignore[no-untyped-call]
            y = _CodeProduct.apply(codes, layer.q).float() * rows * self.scale()[:, 0]  # type: ignore[no-untyped-call]
        else:
            y = F.linear(x, layer.weight).float()
        if (bias := self.bias()) is not None:
            y = y + bias
        out: Tensor = y.to(x.dtype)
        if (branch := self.low_rank()) is not None:
            out = out + F.linear(F.linear(x, branch[0].to(x.dtype)), branch[1].to(x.dtype))
        return out

    def scale(self) -> Tensor:
        """[N, 1] float32, with its change."""
        assert isinstance(self.layer, Fp8Linear)
        before = self.layer.scale.expand(self.out_features, 1)
        scale: Tensor = before * (1 + self.changes["scale"][:, None])
        return scale

    def bias(self) -> Tensor | None:
        """[N] float32, with its change."""
        if self.layer.bias is None:
            return None
        bias: Tensor = self.layer.bias.float() + self.changes["bias"] * self.output_size
        return bias

    def low_rank(self) -> Branch | None:
        """Down and up in float32, with their changes."""
        if self.branch is None:
            return None
        down, up = self.branch
        return down + self.changes["down"] / self.input_size, up + self.changes["up"] * self.output_size[:, None]

    def _open(self, kind: str, shape: tuple[int, ...]) -> None:
        self.changes[kind] = nn.Parameter(torch.zeros(shape, device=self.device))

    @torch.no_grad()
    def trained(self, dtype: torch.dtype) -> Trained:
        """What the layer has become, biases and branches rounded to `dtype`."""
        scale = self.scale().clone() if isinstance(self.layer, Fp8Linear) else None
        bias, branch = self.bias(), self.low_rank()
        return Trained(
            scale=scale,
            bias=None if bias is None else bias.to(dtype),
            low_rank=None if branch is None else (branch[0].to(dtype), branch[1].to(dtype)),
        )


def open_up(model: nn.Module) -> None:
    """Make the linear layers of `model` trainable, in place, and all else not.

    Args:
        model: with FP8 layers whose scales are by tensor or row.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    layers = {name: each for name, each in model.named_modules() if isinstance(each, Fp8Linear | nn.Linear)}
    for name, layer in layers.items():
        model.set_submodule(name, StudentLinear(layer), strict=True)


def parameters_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained, as `layer:kind`."""
    return {f"{name}:{kind}": change for name, each in students(model).items() for kind, change in each.changes.items()}


def close(model: nn.Module, dtype: torch.dtype) -> dict[str, Trained]:
    """Put what was learnt into ordinary layers, in place, rounded as a file will have it.

    Args:
        model: opened by `open_up`.
        dtype: 16 bits, of biases and branches.

    Returns:
        What each layer has become, by name.
    """
    trained = {}
    for name, student in students(model).items():
        new = trained[name] = student.trained(dtype)
        layer = student.layer
        if layer.bias is not None and new.bias is not None:
            layer.bias = nn.Parameter(new.bias.to(layer.bias.dtype), requires_grad=False)
        if isinstance(layer, Fp8Linear):
            assert new.scale is not None
            spec = layer.spec
            layer.spec = LinearSpec(
                format=spec.format,
                granularity="row",
                input_scale=spec.input_scale,
                step_sigmas=spec.step_sigmas,
                full_precision=spec.full_precision,
            )
            layer.scale = new.scale
            if new.low_rank is not None:
                down, up = new.low_rank
                work = torch.float32 if layer.bias is None else layer.bias.dtype
                layer.set_low_rank(down.to(work), up.to(work))
        model.set_submodule(name, layer, strict=True)
    return trained


def students(model: nn.Module) -> dict[str, StudentLinear]:
    """The layers in training, by name."""
    return {name: each for name, each in model.named_modules() if isinstance(each, StudentLinear)}


@contextmanager
def measured(model: nn.Module) -> Iterator[None]:
    """While the model runs here, its layers learn the units of their changes: root mean squares by channel."""
    sums: dict[StudentLinear, tuple[Tensor, Tensor, int]] = {}

    def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(layer, StudentLinear)
        x, y = inputs[0].reshape(-1, layer.in_features), output.reshape(-1, layer.out_features)
        x2, y2 = x.float().square().sum(0), y.float().square().sum(0)
        of_x, of_y, rows = sums.get(layer, (torch.zeros_like(x2), torch.zeros_like(y2), 0))
        sums[layer] = (of_x + x2, of_y + y2, rows + len(x))

    handles = [layer.register_forward_hook(hook) for layer in students(model).values()]
    try:
        with torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
    for layer, (of_x, of_y, rows) in sums.items():
        layer.input_size = (of_x / rows).sqrt().clamp_min(SMALLEST)
        layer.output_size = (of_y / rows).sqrt().clamp_min(SMALLEST)


class _Rounded(torch.autograd.Function):
    """The input as W8A8 arithmetic has it: codes [..., K] in x's dtype, and their scales [..., 1] or [].

    The gradient of what is not clamped passes as if x were only divided by the scale, a constant.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, input_scale: Tensor | None) -> tuple[Tensor, Tensor]:
        scaled = quantize_input(x, input_scale)
        inside = x.abs() <= E4M3FN.max * scaled.scale if input_scale is not None else torch.ones((), device=x.device)
        ctx.save_for_backward(inside / scaled.scale)
        ctx.mark_non_differentiable(scaled.scale)
        return scaled.q.to(x.dtype), scaled.scale

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (factor,) = ctx.saved_tensors
        return (gradients[0] * factor).to(gradients[0].dtype), None


class _CodeProduct(torch.autograd.Function):
    """x · qᵀ, keeping nothing but the codes for the way back: a decoded weight would take four times their memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, q: Tensor) -> Tensor:
        ctx.q = q
        return F.linear(x, q.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return gradient @ ctx.q.to(gradient.dtype), None
