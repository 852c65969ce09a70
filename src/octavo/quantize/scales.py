"""Which scale? For weights the largest value's or the one of least error, for inputs one for the whole schedule."""

import torch
from torch import Tensor

from octavo.errors import NumericsError
from octavo.fp8.formats import E4M3FN, Fp8Format
from octavo.fp8.scale import Granularity, amax, dequantize, quantize, scale_from_amax
from octavo.quantize.observe import BINS, BINS_PER_OCTAVE, LOWEST, InputStatistics
from octavo.quantize.recipe import InputScaleChoice, ScaleChoice

CANDIDATES = 16  # scales tried within one octave; beyond it the same mantissas come again
PERCENTILE = 0.9999  # of magnitudes that stay in range, where that is the rule


def weight_scale(
    weight: Tensor, choice: ScaleChoice, granularity: Granularity, fmt: Fp8Format, importance: Tensor | None = None
) -> Tensor:
    """The scale of `weight` [N, K], [] or [N, 1] float32.

    Args:
        weight: finite, any floating dtype.
        choice: "one", "amax", or "mse": of `CANDIDATES` scales from amax's to twice that, the one of least squared
            rounding error. A float's error depends on where values lie between powers of two, and larger scales clip
            nothing; the formats have range to spare.
        granularity: one for all, or one for each row.
        fmt: the format to round to.
        importance: [K], weighs the columns' errors; the mean square of the inputs.
    """
    if choice == "one":
        return torch.ones((len(weight), 1) if granularity == "row" else (), device=weight.device)
    smallest = scale_from_amax(amax(weight, granularity), fmt)
    if choice == "amax":
        return smallest
    values = weight.float()
    by_column = torch.ones(weight.shape[1], device=weight.device) if importance is None else importance.to(values)
    best, least = smallest, torch.full_like(smallest, torch.inf)
    for step in range(CANDIDATES):
        scale = smallest * 2 ** (step / CANDIDATES)
        error = ((values - dequantize(quantize(values, fmt, scale=scale))) ** 2 @ by_column)[:, None]
        error = error.sum() if granularity == "tensor" else error
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best


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


def expected_error(magnitude: Tensor, scale: Tensor, fmt: Fp8Format) -> Tensor:
    """Mean squared rounding error of values near `magnitude`: a twelfth of the step's square, or what is clipped."""
    reduced = magnitude / scale
    exponent = torch.floor(torch.log2(reduced.clamp_min(fmt.smallest_normal)))
    step = 2 ** (exponent - fmt.mantissa_bits)
    clipped = (reduced - fmt.max).clamp_min(0)
    # Below half of the smallest value nothing is left: the error is the value.
    error = torch.where(reduced < fmt.smallest / 2, reduced**2, step**2 / 12)
    return torch.where(clipped > 0, clipped**2, error) * scale**2
