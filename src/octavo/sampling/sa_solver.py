"""SA-Solver: stochastic Adams, a predictor and a corrector that share one draw of noise per step."""

import math
from itertools import pairwise

from torch import Tensor

from octavo.sampling.flow import DEFAULT_SHIFT, log_snr, off_pure_noise, percent_to_sigma
from octavo.sampling.protocol import Noise, Sampler, check_order
from octavo.sampling.quadrature import interpolation_weights


def sa_solver(
    x: Tensor,
    sigmas: list[float],
    *,
    noise: Noise,
    shift: float = DEFAULT_SHIFT,
    predictor_order: int = 3,
    corrector_order: int = 4,
    evaluate_again: bool = False,
    eta: float = 1.0,
    eta_start: float = 0.2,
    eta_end: float = 0.8,
    s_noise: float = 1.0,
) -> Sampler:
    """SA-Solver on the denoised estimate, in lambda: predict, ask, correct.

    Args:
        evaluate_again: ask once more after the correction (PECE), two calls a step instead of one (PEC).
        eta: the paper's tau, share of noise renewed, between the fractions `eta_start` and `eta_end` of the training
            timesteps; 0 outside.
        predictor_order, corrector_order: how many answers each polynomial passes through; fewer in the first steps
            and in the last before 0.

    Source: Xue et al. 2023 (arXiv 2309.05019), Algorithm 1.
    """
    check_order(predictor_order, most=8)
    check_order(corrector_order, most=8)
    sigmas = off_pure_noise(sigmas, shift)
    lambdas = [log_snr(sigma) for sigma in sigmas]
    stochastic_from, stochastic_to = percent_to_sigma(eta_start, shift), percent_to_sigma(eta_end, shift)

    def tau_at(sigma: float) -> float:
        return eta if stochastic_to <= sigma <= stochastic_from else 0.0

    def adams(x: Tensor, i: int, answers: list[Tensor], newest: int) -> Tensor:
        """From `sigmas[i]` one step down along the polynomial through `answers`, the first of them at `newest`."""
        start, end = lambdas[i], lambdas[i + 1]
        tau = tau_at(sigmas[i + 1])
        rate = 1 + tau**2
        known_at = [lambdas[newest - k] for k in range(len(answers))]
        weights = interpolation_weights(known_at, start, end, density=lambda at: rate * math.exp(rate * (at - end)))
        x = sigmas[i + 1] / sigmas[i] * math.exp(-(tau**2) * (end - start)) * x
        for weight, answer in zip(weights, answers, strict=True):
            x = x + (1 - sigmas[i + 1]) * weight * answer
        return x

    answers: list[Tensor] = []  # newest first
    predicted, drawn = x, x.new_zeros(())
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = yield predicted, sigma
        answers = [denoised, *answers][: max(predictor_order, corrector_order)]
        steps_left = len(sigmas) - 1 - i if sigmas[-1] == 0 else len(sigmas)
        if i == 0 or (sigma_next == 0 and not evaluate_again):
            x = predicted
        else:
            x = adams(x, i - 1, answers[: min(corrector_order, steps_left)], newest=i) + drawn
            if evaluate_again:
                denoised = yield x, sigma
                answers[0] = denoised
        if sigma_next == 0:
            return denoised

        predicted = adams(x, i, answers[: min(predictor_order, steps_left - 1)], newest=i)
        if tau := tau_at(sigma_next):
            h = lambdas[i + 1] - lambdas[i]
            drawn = s_noise * sigma_next * math.sqrt(-math.expm1(-2 * tau**2 * h)) * noise(sigma, sigma_next)
            predicted = predicted + drawn
        else:
            drawn = x.new_zeros(())
    return predicted
