"""Which scale? For weights the largest value's or the one of least error, for inputs one for the whole schedule."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.errors import NumericsError
from octavo.fp8.formats import E4M3FN, Fp8Format
from octavo.fp8.scale import BLOCK, Block, Granularity, amax, dequantize, quantize, scale_from_amax, scale_shape
from octavo.quantize.observe import BINS, BINS_PER_OCTAVE, LOWEST, InputStatistics
from octavo.quantize.recipe import InputScaleChoice, ScaleChoice

CANDIDATES = 16  # scales tried within one octave; beyond it the same mantissas come again
PERCENTILE = 0.9999  # of magnitudes that stay in range, where that is the rule


def weight_scale(
    weight: Tensor,
    choice: ScaleChoice,
    granularity: Granularity,
    fmt: Fp8Format,
    importance: Tensor | None = None,
    block: Block = BLOCK,
) -> Tensor:
    """The scale of `weight` [N, K]: [], [N, 1] or by block, float32.

    Args:
        weight: finite, any floating dtype.
        choice: "one", "amax", or "mse": of `CANDIDATES` scales from amax's to twice that, the one of least squared
            rounding error. A float's error depends on where values lie between powers of two, and larger scales clip
            nothing; the formats have range to spare.
        granularity: one for all, one for each row, or one for each block.
        fmt: the format to round to.
        importance: [K], weighs the columns' errors; the mean square of the inputs.
        block: rows and columns of a block.
    """
    if choice == "one":
        rows, columns = weight.shape
        return torch.ones(scale_shape(rows, columns, granularity, block), device=weight.device)
    smallest = scale_from_amax(amax(weight, granularity, block), fmt)
    if choice == "amax":
        return smallest
    values = weight.float()
    by_column = torch.ones(weight.shape[1], device=weight.device) if importance is None else importance.to(values)
    best, least = smallest, torch.full_like(smallest, torch.inf)
    for step in range(CANDIDATES):
        scale = smallest * 2 ** (step / CANDIDATES)
        rounded = dequantize(quantize(values, fmt, granularity, scale, block))
        error = _sum((values - rounded) ** 2 * by_column, granularity, block)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best


def _sum(errors: Tensor, granularity: Granularity, block: Block) -> Tensor:
    """Over all that shares a scale."""
    if granularity == "tensor":
        return errors.sum()
    if granularity == "row":
        return errors.sum(1, keepdim=True)
    (rows, columns), (n, k) = errors.shape, block
    down, across = scale_shape(rows, columns, "block", block)
    return F.pad(errors, (0, across * k - columns, 0, down * n - rows)).view(down, n, across, k).sum((1, 3))


def input_scale(statistics: InputStatistics, choice: InputScaleChoice, fmt: Fp8Format = E4M3FN) -> Tensor:
    """One scale, [] float32, for an input whatever the step.

    Args:
        statistics: of the input, by step group.
        choice: "one"; "amax": nothing seen is clipped; "percentile": all but 1 in 10,000 magnitudes; "mse": the least
            expected relative error, where every step group counts alike, so that an input that drifts over the
            schedule is served in the quiet parts too.
        fmt: the format to round to.

    Raises:
        NumericsError: what was seen is not finite.
    """
    if not bool(torch.isfinite(statistics.amax).all()):
        raise NumericsError("The calibration met NaN or infinity in a layer's input. Calibrate in float32 or bfloat16.")
    largest = scale_from_amax(statistics.amax.amax().cpu(), fmt)
    if choice == "one":
        return torch.ones(())
    if choice == "amax":
        return largest
    magnitudes = 2 ** (LOWEST + (torch.arange(BINS, dtype=torch.float64) + 0.5) / BINS_PER_OCTAVE)
    counts = statistics.histogram.cpu().double()
    if choice == "percentile":
        share = counts.sum(0).cumsum(0) / counts.sum().clamp_min(1)
        index = min(int((share < PERCENTILE).sum()), BINS - 1)
        return torch.minimum(scale_from_amax(magnitudes[index], fmt), largest)
    counts = counts[counts.sum(1) > 0]
    if not len(counts):
        return largest
    steps = torch.arange(-BINS_PER_OCTAVE, 6 * BINS_PER_OCTAVE + 1, dtype=torch.float64)
    scales = largest.double() * 2 ** (-steps / BINS_PER_OCTAVE)  # from twice amax's to a 64th of it
    powers = counts @ magnitudes**2
    errors = torch.stack([((counts @ expected_error(magnitudes, scale, fmt)) / powers).sum() for scale in scales])
    return scales[int(errors.argmin())].float()


def input_scales(statistics: InputStatistics, choice: InputScaleChoice, fmt: Fp8Format = E4M3FN) -> Tensor:
    """`input_scale` for each step group by itself: [G] float32. A group that never came gets the scale of all."""
    overall = input_scale(statistics, choice, fmt)
    scales = []
    for group, largest in enumerate(statistics.amax):
        own = slice(group, group + 1)
        alone = replace(statistics, amax=statistics.amax[own], histogram=statistics.histogram[own])
        scales.append(input_scale(alone, choice, fmt) if largest > 0 else overall)
    return torch.stack(scales)


def expected_error(magnitude: Tensor, scale: Tensor, fmt: Fp8Format) -> Tensor:
    """Mean squared rounding error of values near `magnitude`: a twelfth of the step's square, or what is clipped."""
    reduced = magnitude / scale
    exponent = torch.floor(torch.log2(reduced.clamp_min(fmt.smallest_normal)))
    step = 2 ** (exponent - fmt.mantissa_bits)
    clipped = (reduced - fmt.max).clamp_min(0)
    # Below half of the smallest value nothing is left: the error is the value.
    error = torch.where(reduced < fmt.smallest / 2, reduced**2, step**2 / 12)
    return torch.where(clipped > 0, clipped**2, error) * scale**2
