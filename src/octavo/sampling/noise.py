"""Noise that belongs to a request: the same for a seed on every machine, device and dtype.

All of it is drawn on the CPU in float32 and moved from there. Two kinds feed samplers (`SamplerSpec.stochastic`):
`default` draws afresh at every step, `brownian` reads one Brownian path, so that a step cut in two sees the same noise
as the whole step. A request's starting noise is `initial_noise`.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from octavo.devices import moved
from octavo.errors import MissingExtraError, RequestError
from octavo.sampling.protocol import Noise, SamplerSpec

SEEDS = 2**64
_PATH_DIGITS = 6  # decimals of sigma to which a Brownian path is resolved


def initial_noise(shape: Sequence[int], seed: int, batch_index: Sequence[int] | None = None) -> Tensor:
    """The noise that a run starts from.

    Args:
        shape: [B, ...] of the latents.
        seed: 0 to 2**64 - 1.
        batch_index: for each row, which picture of this seed it is, counted from 0; `[0, 1, ..., B - 1]` by default.
            With it, row k is what picture k of a larger batch would get if each were drawn on its own.

    Returns:
        Standard normal noise of that shape, float32, on the CPU.

    Raises:
        RequestError: a seed out of range or a list of the wrong length.
    """
    generator = torch.Generator("cpu").manual_seed(_checked(seed))
    if batch_index is None:
        return torch.randn(tuple(shape), generator=generator)
    if len(batch_index) != shape[0] or min(batch_index, default=0) < 0:
        raise RequestError(f"batch_index={list(batch_index)}: need {shape[0]} numbers from 0 up, one per picture.")
    pictures = [torch.randn((1, *shape[1:]), generator=generator) for _ in range(max(batch_index) + 1)]
    return torch.cat([pictures[index] for index in batch_index])


def for_run(sampler: SamplerSpec, like: Tensor, sigmas: Sequence[float], seed: int) -> Noise | None:
    """The noise source that `sampler` needs for a run over `sigmas` on tensors like `like`; None if it draws none."""
    match sampler.stochastic:
        case "none":
            return None
        case "default":
            return default_noise(like, seed)
        case "brownian":
            return brownian_noise(like, seed, sigmas)


def default_noise(like: Tensor, seed: int) -> Noise:
    """Independent draws, one after the other, from the seed after the request's (so that none repeats the start).

    Args:
        like: what the draws are shaped and placed like.
        seed: the request's, 0 to 2**64 - 1.
    """
    generator = torch.Generator("cpu").manual_seed((_checked(seed) + 1) % SEEDS)

    def draw(_sigma: float, _sigma_next: float) -> Tensor:
        return moved(torch.randn(like.shape, generator=generator), like)

    return draw


def brownian_noise(like: Tensor, seed: int, sigmas: Sequence[float]) -> Noise:
    """Increments of one Brownian path on the way from sigma down to sigma_next, scaled to variance 1.

    Args:
        like: what the draws are shaped and placed like.
        seed: the request's; it fixes the whole path, whatever is read of it and in which order.
        sigmas: of the run. The path spans its levels above 0.

    Raises:
        MissingExtraError: torchsde is not installed.

    Source: Li et al. 2020 (arXiv 2001.01328), virtual Brownian tree.
    """
    try:
        from torchsde import BrownianTree
    except ImportError as missing:
        raise MissingExtraError("SDE samplers need torchsde; run: pip install torchsde") from missing
    levels = [sigma for sigma in sigmas if sigma > 0]
    unit = 10**-_PATH_DIGITS
    low = round(min(levels), _PATH_DIGITS)
    high = max(round(max(levels), _PATH_DIGITS), round(low + unit, _PATH_DIGITS))
    tree = BrownianTree(low, torch.zeros(like.shape), high, entropy=_checked(seed), tol=unit)

    def draw(sigma: float, sigma_next: float) -> Tensor:
        # The path's ends are rounded, so a level at an end may lie just beyond it.
        start, end, length = max(sigma_next, low), min(sigma, high), sigma - sigma_next
        if length < unit or round(start, _PATH_DIGITS) >= round(end, _PATH_DIGITS):
            # Closer than the path is resolved: its smallest piece there, lest there be no noise at all.
            end = min(round(max(end, low + unit), _PATH_DIGITS), high)
            start, length = max(round(end - unit, _PATH_DIGITS), low), unit
        increment: Tensor = tree(start, end)
        return moved(-increment / math.sqrt(length), like)

    return draw


def _checked(seed: int) -> int:
    if not 0 <= seed < SEEDS:
        raise RequestError(f"seed={seed}: need a whole number from 0 to {SEEDS - 1}.")
    return seed
