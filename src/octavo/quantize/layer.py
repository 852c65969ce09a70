"""One quantized layer on its way from `quantize` to a model or a file."""

from dataclasses import dataclass

from torch import Tensor

from octavo.fp8.scale import Scaled


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedLayer:
    """What replaces a linear layer's weight and bias."""

    weight: Scaled  # q [N, K], scale [], [N, 1] or by block
    bias: Tensor | None  # [N], 16 bits as in the source, corrected where the recipe says so
    input_scale: Tensor | None  # [] float32, calibrated; [G] where it changes over the schedule
    full_precision: bool  # never round the input
    low_rank: tuple[Tensor, Tensor] | None  # down [r, K] and up [N, r] in 16 bits: + x · downᵀ · upᵀ
    step_sigmas: tuple[float, ...] = ()  # the levels at which the input's scale changes, see `fp8.steps`
