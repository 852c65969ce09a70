"""One linear layer by its rule: the order of the work."""

import torch
from torch import Tensor

from octavo.errors import CheckpointError, RequestError
from octavo.fp8.scale import quantize
from octavo.quantize.layer import QuantizedLayer
from octavo.quantize.low_rank import low_rank_branch
from octavo.quantize.observe import InputStatistics
from octavo.quantize.recipe import LayerRule
from octavo.quantize.rounding import gptq
from octavo.quantize.scales import input_scale, input_scales, weight_scale


def quantize_layer(
    name: str,
    weight: Tensor,
    bias: Tensor | None,
    rule: LayerRule,
    statistics: InputStatistics | None,
    step_sigmas: tuple[float, ...] = (),
) -> QuantizedLayer:
    """What becomes of a linear layer.

    Args:
        name: for messages.
        weight: [N, K]; its dtype is that of the low-rank branch.
        bias: [N] or None.
        rule: not one that keeps the layer.
        statistics: of its input; None for rules that need none.
        step_sigmas: levels between the groups of `statistics`, for a rule with `input_steps`.

    Raises:
        CheckpointError: the weight holds NaN or infinity.
        RequestError: the rule needs statistics, and the calibration never reached the layer.
    """
    assert not rule.keep, f"'{name}' stays in 16 bits"
    if not bool(torch.isfinite(weight).all()):
        raise CheckpointError(f"The weight of '{name}' holds NaN or infinity. Download or make the model again.")
    if rule.statistics and statistics is None:
        raise RequestError(
            f"The calibration never used '{name}', which its rule needs. Use more prompts, or a recipe without "
            "calibration such as 'row'."
        )
    square = None if statistics is None else statistics.square.to(weight.device)

    branch, rest = None, weight.float()
    if rule.low_rank and square is not None:
        branch = low_rank_branch(weight, square, rule.low_rank)
        rest = (
            rest - branch[1].float() @ branch[0].float()
        )  # of the rounded factors, so that their error is rounded too

    block = rule.block if rule.granularity == "block" else None
    scale = weight_scale(rest, rule.scale, rule.granularity, rule.fp8_format, square, rule.block)
    if rule.rounding == "gptq":
        assert statistics is not None
        assert statistics.covariance is not None
        scaled = gptq(rest, statistics.covariance.to(rest.device), scale, rule.fp8_format, rule.damping, block)
    else:
        scaled = quantize(rest, rule.fp8_format, rule.granularity, scale, rule.block)

    static, steps = None, step_sigmas if rule.input_steps else ()
    if rule.input == "static":
        static = torch.ones(()) if statistics is None else input_scale(statistics, rule.input_scale)
        if steps and statistics is not None:
            static = input_scales(statistics, rule.input_scale)
    return QuantizedLayer(
        weight=scaled,
        bias=bias,
        input_scale=static,
        full_precision=rule.input == "exact",
        low_rank=branch,
        step_sigmas=steps,
    )
