"""CFG++ samplers: noise is put back along the unguided prediction, so guidance does not leave the data's manifold.

Each is sent `Guided`: the guided estimate and the one of the negative prompt alone. A guidance scale around 1 to 2
suits them; they cost two model calls a step even at 1.

Source of the idea: Chung et al. 2024 (arXiv 2406.08070); each sampler is the named one with its Euler direction, or
the history that it extrapolates, taken from the unguided estimate.
"""

import math
from itertools import pairwise

from torch import Tensor

from octavo.sampling.ancestral import ve_ancestral_step
from octavo.sampling.flow import velocity
from octavo.sampling.multistep import res_step
from octavo.sampling.protocol import GuidedSampler, Noise


def euler_cfg_pp(x: Tensor, sigmas: list[float]) -> GuidedSampler:
    """DDIM steps with CFG++: the new mixture is guided data plus unguided noise; the paper's Algorithm 2."""
    for sigma, sigma_next in pairwise(sigmas):
        denoised, uncond = yield x, sigma
        x = (1 - sigma_next) * denoised + sigma_next * _noise_in(x, uncond, sigma)
    return x


def euler_ancestral_cfg_pp(
    x: Tensor, sigmas: list[float], *, noise: Noise, eta: float = 1.0, s_noise: float = 1.0
) -> GuidedSampler:
    """`euler_cfg_pp` with a part of the noise drawn afresh at each step, by the VE rule on `sigma / (1 - sigma)`."""
    for sigma, sigma_next in pairwise(sigmas):
        denoised, uncond = yield x, sigma
        if sigma_next == 0:
            return denoised
        signal = 1 - sigma_next
        step = ve_ancestral_step(sigma / (1 - sigma) if sigma < 1 else math.inf, sigma_next / signal, eta)
        mixed = denoised + step.down * _noise_in(x, uncond, sigma) + noise(sigma, sigma_next) * (s_noise * step.up)
        x = signal * mixed
    return x


def _noise_in(x: Tensor, denoised: Tensor, sigma: float) -> Tensor:
    """The noise that, mixed with `denoised` at `sigma`, gives x."""
    return (x - (1 - sigma) * denoised) / sigma


def dpmpp_2m_cfg_pp(x: Tensor, sigmas: list[float]) -> GuidedSampler:
    """`dpmpp_2m` with CFG++."""
    uncond_before, h_before = None, 0.0
    for sigma, sigma_next in pairwise(sigmas):
        denoised, uncond = yield x, sigma
        if sigma_next == 0:
            return denoised
        h, ratio = math.log(sigma / sigma_next), sigma_next / sigma
        x_next = denoised + ratio * (x - uncond)
        if uncond_before is not None:
            x_next = x_next + (1 - ratio) * h / (2 * h_before) * (denoised - uncond_before)
        x, uncond_before, h_before = x_next, uncond, h
    return x


def dpmpp_2s_ancestral_cfg_pp(
    x: Tensor, sigmas: list[float], *, noise: Noise, eta: float = 1.0, s_noise: float = 1.0
) -> GuidedSampler:
    """DPM-Solver++(2S) with CFG++ and fresh noise after each step, as ComfyUI has it.

    The push from `uncond` takes the latest `uncond`, that of mid-step, also from the estimate at the step's start; and
    noise follows the classical rule (VE). So more steps change the picture without end, even where both predictions
    are the same.
    """
    for sigma, sigma_next in pairwise(sigmas):
        denoised, uncond = yield x, sigma
        if sigma_next == 0:
            return denoised
        step = ve_ancestral_step(sigma, sigma_next, eta)
        sigma_mid = math.sqrt(sigma * step.down)
        ratio_mid, ratio = sigma_mid / sigma, step.down / sigma
        x_mid = ratio_mid * (x + denoised - uncond) + (1 - ratio_mid) * denoised
        denoised_mid, uncond_mid = yield x_mid, sigma_mid
        x = ratio * (x + denoised - uncond_mid) + (1 - ratio) * denoised_mid
        x = x + noise(sigma, sigma_next) * (s_noise * step.up)
    return x


def gradient_estimation_cfg_pp(x: Tensor, sigmas: list[float], *, gamma: float = 2.0) -> GuidedSampler:
    """`gradient_estimation` with CFG++."""
    d_before = None
    for sigma, sigma_next in pairwise(sigmas):
        denoised, uncond = yield x, sigma
        if sigma_next == 0:
            return denoised
        d = velocity(x, uncond, sigma)
        x = denoised + d * sigma_next
        if d_before is not None:
            x = x + (gamma - 1) * (d - d_before) * (sigma_next - sigma)
        d_before = d
    return x


def res_multistep_cfg_pp(x: Tensor, sigmas: list[float]) -> GuidedSampler:
    """`res_multistep` with CFG++."""
    return (yield from res_multistep_ancestral_cfg_pp(x, sigmas, noise=lambda *_: x.new_zeros(()), eta=0.0))


def res_multistep_ancestral_cfg_pp(
    x: Tensor, sigmas: list[float], *, noise: Noise, eta: float = 1.0, s_noise: float = 1.0
) -> GuidedSampler:
    """`res_multistep_ancestral` with CFG++."""
    uncond_before, place = None, 0.0
    for sigma, sigma_next in pairwise(sigmas):
        denoised, uncond = yield x, sigma
        if sigma_next == 0:
            return denoised
        step = ve_ancestral_step(sigma, sigma_next, eta)
        if uncond_before is None:
            x = denoised + velocity(x, uncond, sigma) * step.down
        else:
            x = res_step(x + denoised - uncond, uncond, uncond_before, sigma, step.down, place=place)
        x = x + noise(sigma, sigma_next) * (s_noise * step.up)
        uncond_before, place = uncond, math.log(step.down / sigma)
    return x
