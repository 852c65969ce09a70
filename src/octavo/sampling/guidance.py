"""Guidance: from several predictions for the same (x, sigma) to the one that the sampler is sent.

A prediction is a denoised estimate [B, C, h, w]: `cond` with the prompt, `uncond` with the negative prompt, `skipped`
with the prompt and some of the model's blocks left out. `Guidance.passes` says which of them are worth a model call
at a level, `Guidance.combine` puts them together; the formulas are plain functions below. Rows never mix.
"""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from octavo.errors import RequestError
from octavo.sampling.flow import DEFAULT_SHIFT, percent_to_sigma
from octavo.sampling.protocol import Guided

Pass = Literal["cond", "uncond", "skipped"]


class Predictions(NamedTuple):
    """Denoised estimates for one (x, sigma), all of one shape; None where no pass was made."""

    cond: Tensor
    uncond: Tensor | None = None
    skipped: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassifierFree:
    """Push from the negative prompt's prediction past the prompt's.

    Source: Ho and Salimans 2022 (arXiv 2207.12598); an interval as in Kynkäänniemi et al. 2024 (arXiv 2404.07724).
    """

    scale: float = 4.5  # 1 means none
    rescale: float = 0.0  # share of the result brought back to the prompt's own contrast, 0 to 1
    start: float = 0.0  # fraction of the training timesteps, from pure noise
    end: float = 1.0  # likewise; outside the interval the prompt's prediction is taken as it is

    def __post_init__(self) -> None:
        _check_finite("guidance scale", self.scale)
        _check_share("rescale", self.rescale)
        _check_interval(self.start, self.end)

    def active(self, sigma: float, shift: float = DEFAULT_SHIFT) -> bool:
        """Whether it changes anything at this level."""
        return self.scale != 1 and _within(sigma, self.start, self.end, shift)


@dataclass(frozen=True, slots=True, kw_only=True)
class SkipLayerGuidance:
    """Push away from a run that skips some blocks; made for SD3.5 Medium.

    Source: Stability AI's SD3.5 reference code; the idea is that of Karras et al. 2024 (arXiv 2406.02507), to guide a
    model by a worse version of itself.
    """

    scale: float = 2.5
    layers: tuple[int, ...] = (7, 8, 9)  # blocks, counted from 0
    start: float = 0.01  # fraction of the training timesteps, from pure noise
    end: float = 0.20  # likewise
    rescale: float = 0.0  # share of the result brought back to the prompt's own contrast, 0 to 1

    def __post_init__(self) -> None:
        _check_finite("skip-layer scale", self.scale)
        _check_share("rescale", self.rescale)
        _check_interval(self.start, self.end)
        if any(layer < 0 for layer in self.layers):
            raise RequestError(f"layers={self.layers}: blocks are counted from 0.")

    def active(self, sigma: float, shift: float = DEFAULT_SHIFT) -> bool:
        """Whether it changes anything at this level."""
        return self.scale != 0 and bool(self.layers) and _within(sigma, self.start, self.end, shift)


@dataclass(frozen=True, slots=True, kw_only=True)
class Guidance:
    """Everything that steers one request."""

    classifier_free: ClassifierFree = field(default_factory=ClassifierFree)
    skip_layers: SkipLayerGuidance | None = None

    def passes(self, sigma: float, shift: float = DEFAULT_SHIFT, *, needs_uncond: bool = False) -> tuple[Pass, ...]:
        """The predictions to make at `sigma`.

        Args:
            shift: of the model.
            needs_uncond: the sampler wants `uncond` even where it would not change the result (CFG++).
        """
        wanted: list[Pass] = ["cond"]
        if needs_uncond or self.classifier_free.active(sigma, shift):
            wanted.append("uncond")
        if self.skip_layers is not None and self.skip_layers.active(sigma, shift):
            wanted.append("skipped")
        return tuple(wanted)

    def combine(self, x: Tensor, sigma: float, predictions: Predictions, shift: float = DEFAULT_SHIFT) -> Guided:
        """What the sampler is sent: of the result, samplers other than CFG++ take `.denoised`.

        Args:
            x: what was asked about, at `sigma`.
            predictions: at least those of `passes`.
            shift: of the model.
        """
        cond, uncond, skipped = predictions
        denoised = cond
        if self.classifier_free.active(sigma, shift):
            assert uncond is not None, "classifier-free guidance without the negative prompt's prediction"
            denoised = classifier_free(cond, uncond, self.classifier_free.scale)
            if self.classifier_free.rescale:
                denoised = rescaled(denoised, cond, x, sigma, self.classifier_free.rescale)
        if self.skip_layers is not None and self.skip_layers.active(sigma, shift):
            assert skipped is not None, "skip-layer guidance without the prediction that skips layers"
            denoised = skip_layer(denoised, cond, skipped, self.skip_layers.scale)
            if self.skip_layers.rescale:
                denoised = _to_contrast_of(cond, denoised, self.skip_layers.rescale)
        return Guided(denoised, cond if uncond is None else uncond)


def classifier_free(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """`uncond + scale * (cond - uncond)`."""
    return uncond + (cond - uncond) * scale


def skip_layer(guided: Tensor, cond: Tensor, skipped: Tensor, scale: float) -> Tensor:
    """`guided + scale * (cond - skipped)`."""
    return guided + (cond - skipped) * scale


def rescaled(guided: Tensor, cond: Tensor, x: Tensor, sigma: float, share: float) -> Tensor:
    """`guided` with `share` of it brought to the prompt's own contrast, against overexposure at large scales.

    Contrast is the deviation over a row of the v-prediction of a variance-preserving diffusion with this sigma as its
    noise-to-signal ratio, which is how ComfyUI's RescaleCFG treats a rectified flow, too.

    Args:
        guided, cond: estimates after and before guidance.
        x: what was asked about, at `sigma` > 0.
        share: 0 changes nothing; 0.7 is the paper's choice.

    Source: Lin et al. 2023 (arXiv 2305.08891), section 3.4.
    """
    # v = (x / (1 + sigma**2) - denoised) * sqrt(1 + sigma**2) / sigma; the constant factor does not change the ratio.
    centre = x / (1 + sigma**2)
    return centre - _to_contrast_of(centre - cond, centre - guided, share)


def _to_contrast_of(model: Tensor, values: Tensor, share: float) -> Tensor:
    """`values` times a factor per row that takes its deviation `share` of the way to that of `model`."""
    rows = tuple(range(1, values.dim()))
    contrast = values.std(dim=rows, keepdim=True)
    # Values without any, such as those of prompts that hold nowhere, stay as they are.
    ratio = torch.where(contrast > 0, model.std(dim=rows, keepdim=True) / contrast, 1.0)
    return values * (share * ratio + (1 - share))


def _within(sigma: float, start: float, end: float, shift: float) -> bool:
    return percent_to_sigma(end, shift) <= sigma <= percent_to_sigma(start, shift)


def _check_finite(what: str, value: float) -> None:
    if not abs(value) < float("inf"):
        raise RequestError(f"{what}={value}: need a finite number.")


def _check_share(what: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise RequestError(f"{what}={value}: need 0 (off) to 1.")


def _check_interval(start: float, end: float) -> None:
    if not 0 <= start < end <= 1:
        raise RequestError(f"start={start}, end={end}: need 0 <= start < end <= 1.")
