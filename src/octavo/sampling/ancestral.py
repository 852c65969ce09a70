"""Samplers that step too far down and make up for it with fresh noise.

On a rectified flow the data's share of a mixture shrinks as noise grows, so going back up rescales:
`flow_ancestral_step` says how. `ve_ancestral_step` is the classical rule, for data that keep their size.
Samplers that draw noise inside an exponential integrator are in `sde`.
"""

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from octavo.sampling.flow import add_noise, log_snr, sigma_from_log_snr, velocity
from octavo.sampling.multistep import res_step
from octavo.sampling.protocol import Noise, Sampler


class AncestralStep(NamedTuple):
    """Go down to `down`, multiply by `scale`, add `up` times fresh noise: the mixture of the level asked for."""

    down: float
    scale: float
    up: float


def flow_ancestral_step(sigma: float, sigma_next: float, eta: float) -> AncestralStep:
    """A rectified flow's step to `sigma_next` > 0 with the share `eta` of fresh noise.

    `down` is chosen, between `sigma_next` at eta 0 and `sigma_next**2 / sigma` at eta 1; the rest follows from the
    shares of data (`1 - sigma_next`) and of noise variance (`sigma_next**2`) that the result must have.
    """
    down = sigma_next * (1 + (sigma_next / sigma - 1) * eta)
    scale = (1 - sigma_next) / (1 - down)
    return AncestralStep(down, scale, math.sqrt(max(sigma_next**2 - (scale * down) ** 2, 0.0)))


def ve_ancestral_step(sigma: float, sigma_next: float, eta: float) -> AncestralStep:
    """The step for data plus noise of level sigma (VE): Song et al. 2021 (arXiv 2011.13456), ancestral sampling.

    `sigma` may be infinite: then nothing of the old noise need be kept.
    """
    variance_kept = sigma_next**2 * (1 - (sigma_next / sigma) ** 2)
    up = min(sigma_next, eta * math.sqrt(max(variance_kept, 0.0)))
    return AncestralStep(math.sqrt(sigma_next**2 - up**2), 1.0, up)


def euler_ancestral(x: Tensor, sigmas: list[float], *, noise: Noise, eta: float = 1.0, s_noise: float = 1.0) -> Sampler:
    """Euler steps with fresh noise after each; k-diffusion's sampler with the noise rule of a rectified flow.

    Args:
        eta: share of fresh noise, 0 is Euler.
        s_noise: factor on that noise.
    """
    for sigma, sigma_next in pairwise(sigmas):
        denoised = yield x, sigma
        if sigma_next == 0:
            return denoised
        step = flow_ancestral_step(sigma, sigma_next, eta)
        x = x + velocity(x, denoised, sigma) * (step.down - sigma)
        x = step.scale * x + noise(sigma, sigma_next) * (s_noise * step.up)
    return x


def dpm_2_ancestral(x: Tensor, sigmas: list[float], *, noise: Noise, eta: float = 1.0, s_noise: float = 1.0) -> Sampler:
    """Midpoint steps (see `dpm_2`) with fresh noise after each, by the noise rule of a rectified flow."""
    for sigma, sigma_next in pairwise(sigmas):
        denoised = yield x, sigma
        if sigma_next == 0:
            return denoised
        step = flow_ancestral_step(sigma, sigma_next, eta)
        sigma_mid = math.sqrt(sigma * step.down)
        x_mid = x + velocity(x, denoised, sigma) * (sigma_mid - sigma)
        denoised = yield x_mid, sigma_mid
        x = x + velocity(x_mid, denoised, sigma_mid) * (step.down - sigma)
        x = step.scale * x + noise(sigma, sigma_next) * (s_noise * step.up)
    return x


def dpmpp_2s_ancestral(
    x: Tensor, sigmas: list[float], *, noise: Noise, eta: float = 1.0, s_noise: float = 1.0
) -> Sampler:
    """DPM-Solver++(2S) with fresh noise after each step, by the noise rule of a rectified flow.

    The midpoint lies half-way in lambda, the log signal-to-noise ratio; from pure noise, where lambda is infinite,
    at 0.9999.

    Source: Lu et al. 2022 (arXiv 2211.01095), Algorithm 1.
    """
    for sigma, sigma_next in pairwise(sigmas):
        denoised = yield x, sigma
        if sigma_next == 0:
            return denoised
        step = flow_ancestral_step(sigma, sigma_next, eta)
        if sigma < 1:
            sigma_mid = sigma_from_log_snr((log_snr(sigma) + log_snr(step.down)) / 2)
        else:
            sigma_mid = max(0.9999, (1 + step.down) / 2)
        x_mid = x + velocity(x, denoised, sigma) * (sigma_mid - sigma)
        denoised = yield x_mid, sigma_mid
        ratio = step.down / sigma
        x = step.scale * (ratio * x + (1 - ratio) * denoised) + noise(sigma, sigma_next) * (s_noise * step.up)
    return x


def res_multistep_ancestral(
    x: Tensor, sigmas: list[float], *, noise: Noise, eta: float = 1.0, s_noise: float = 1.0
) -> Sampler:
    """`res_multistep` with fresh noise after each step, by the classical rule, with `ddpm`'s excess on a flow.

    Source: Zhang et al. 2023 (arXiv 2308.02157), as k-diffusion forks made it ancestral.
    """
    denoised_before, place = None, 0.0
    for sigma, sigma_next in pairwise(sigmas):
        denoised = yield x, sigma
        if sigma_next == 0:
            return denoised
        step = ve_ancestral_step(sigma, sigma_next, eta)
        x = res_step(x, denoised, denoised_before, sigma, step.down, place=place)
        x = x + noise(sigma, sigma_next) * (s_noise * step.up)
        denoised_before, place = denoised, math.log(step.down / sigma)
    return x


def lcm(x: Tensor, sigmas: list[float], *, noise: Noise) -> Sampler:
    """Jump to the denoised estimate, mix it with fresh noise for the next level; for consistency-distilled models.

    Source: Song et al. 2023 (arXiv 2303.01469), Algorithm 1; Luo et al. 2023 (arXiv 2310.04378).
    """
    for sigma, sigma_next in pairwise(sigmas):
        denoised = yield x, sigma
        x = denoised if sigma_next == 0 else add_noise(denoised, noise(sigma, sigma_next), sigma_next)
    return x


def ddpm(x: Tensor, sigmas: list[float], *, noise: Noise) -> Sampler:
    """DDPM's ancestral steps, sigma taken for the noise level of data that keep their size.

    A rectified flow's data shrink as noise grows, so there its pictures vary more than the data do, however many
    steps are made; kept for those who know its look. Up to rounding, Euler steps with `ve_ancestral_step` at eta 1.

    Source: Ho et al. 2020 (arXiv 2006.11239), Algorithm 2, with alpha-bar = 1 / (1 + sigma**2).
    """
    for sigma, sigma_next in pairwise(sigmas):
        denoised = yield x, sigma
        d = velocity(x, denoised, sigma)
        # In x's dtype: at low noise 1 - alpha_bar loses digits in float32, and pictures made elsewhere carry that.
        alpha_bar, alpha_bar_next = (1 / (1 + torch.tensor(level, dtype=x.dtype) ** 2) for level in (sigma, sigma_next))
        if alpha_bar == 1:  # too little noise to be told from none
            x = denoised
            continue
        alpha = alpha_bar / alpha_bar_next
        x = (alpha_bar.sqrt() * x - (1 - alpha) / (1 - alpha_bar).sqrt() * d) / alpha.sqrt()
        if sigma_next > 0:
            deviation = ((1 - alpha) * (1 - alpha_bar_next) / (1 - alpha_bar)).sqrt()
            x = (x + deviation * noise(sigma, sigma_next)) / alpha_bar_next.sqrt()
    return x
