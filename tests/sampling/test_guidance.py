"""Combining predictions: the formulas, when they act, and which model calls they need."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from octavo.errors import RequestError
from octavo.sampling import ClassifierFree, Guidance, Predictions, SkipLayerGuidance, percent_to_sigma
from octavo.sampling.guidance import classifier_free, rescaled, skip_layer

SHAPE = (2, 4, 6, 6)


def random(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


X, COND, UNCOND, SKIPPED = (random(seed) for seed in range(4))


def deviations(values: Tensor) -> Tensor:
    return values.flatten(1).std(dim=1)


@given(scale=st.floats(-5, 20))
def test_guidance_moves_along_the_line_through_both_predictions(scale: float) -> None:
    torch.testing.assert_close(classifier_free(COND, UNCOND, scale), scale * COND + (1 - scale) * UNCOND)


def test_skip_layer_guidance_adds_what_the_skipped_blocks_do() -> None:
    torch.testing.assert_close(skip_layer(UNCOND, COND, SKIPPED, 2.5), UNCOND + 2.5 * COND - 2.5 * SKIPPED)


@pytest.mark.parametrize("sigma", [0.05, 0.5, 1.0])
def test_full_rescaling_gives_the_prompts_own_contrast(sigma: float) -> None:
    """Contrast of the v-prediction, up to a factor that both sides share."""
    guided = classifier_free(COND, UNCOND, 7.0)
    centre = X / (1 + sigma**2)
    result = rescaled(guided, COND, X, sigma, share=1.0)
    torch.testing.assert_close(deviations(centre - result), deviations(centre - COND))


def test_no_rescaling_changes_nothing_and_rows_do_not_mix() -> None:
    guided = classifier_free(COND, UNCOND, 7.0)
    torch.testing.assert_close(rescaled(guided, COND, X, 0.5, share=0.0), guided)
    alone = rescaled(guided[:1], COND[:1], X[:1], 0.5, share=0.7)
    torch.testing.assert_close(rescaled(guided, COND, X, 0.5, share=0.7)[:1], alone)


def test_a_scale_of_one_needs_no_negative_prompt() -> None:
    guidance = Guidance(classifier_free=ClassifierFree(scale=1.0))
    assert guidance.passes(0.5) == ("cond",)
    guided = guidance.combine(X, 0.5, Predictions(COND))
    assert torch.equal(guided.denoised, COND)
    assert torch.equal(guided.uncond, COND)


def test_cfg_pp_samplers_get_the_negative_prompt_whatever_the_scale() -> None:
    guidance = Guidance(classifier_free=ClassifierFree(scale=1.0))
    assert guidance.passes(0.5, needs_uncond=True) == ("cond", "uncond")
    guided = guidance.combine(X, 0.5, Predictions(COND, UNCOND))
    assert torch.equal(guided.denoised, COND)
    assert torch.equal(guided.uncond, UNCOND)


def test_outside_its_interval_guidance_makes_no_calls_and_changes_nothing() -> None:
    guidance = Guidance(classifier_free=ClassifierFree(scale=5.0, start=0.2, end=0.8))
    inside, before, after = percent_to_sigma(0.5), percent_to_sigma(0.1), percent_to_sigma(0.9)
    assert guidance.passes(inside) == ("cond", "uncond")
    assert guidance.passes(before) == guidance.passes(after) == ("cond",)
    assert torch.equal(guidance.combine(X, before, Predictions(COND, UNCOND)).denoised, COND)
    torch.testing.assert_close(
        guidance.combine(X, inside, Predictions(COND, UNCOND)).denoised, classifier_free(COND, UNCOND, 5.0)
    )


def test_an_interval_includes_both_its_ends() -> None:
    slg = SkipLayerGuidance(start=0.25, end=0.5)
    assert slg.active(percent_to_sigma(0.25))
    assert slg.active(percent_to_sigma(0.5))
    assert not slg.active(percent_to_sigma(0.25) + 1e-6)
    assert not slg.active(percent_to_sigma(0.5) - 1e-6)


def test_an_interval_is_a_share_of_the_timesteps_so_shift_moves_its_levels() -> None:
    slg = SkipLayerGuidance(start=0.01, end=0.2)
    assert slg.active(0.85, shift=1.0)
    assert not slg.active(0.85, shift=3.0)
    assert slg.active(0.95, shift=3.0)


def test_the_default_skip_layer_guidance_is_that_of_sd35_medium() -> None:
    slg = SkipLayerGuidance()
    assert (slg.scale, slg.layers, slg.start, slg.end) == (2.5, (7, 8, 9), 0.01, 0.20)


def test_skip_layer_guidance_comes_after_classifier_free_guidance() -> None:
    guidance = Guidance(
        classifier_free=ClassifierFree(scale=5.0), skip_layers=SkipLayerGuidance(scale=3.0, start=0, end=1)
    )
    assert guidance.passes(0.5) == ("cond", "uncond", "skipped")
    guided = guidance.combine(X, 0.5, Predictions(COND, UNCOND, SKIPPED))
    expected = skip_layer(classifier_free(COND, UNCOND, 5.0), COND, SKIPPED, 3.0)
    torch.testing.assert_close(guided.denoised, expected)
    torch.testing.assert_close(guided.uncond, UNCOND)


def test_skip_layer_guidance_can_keep_the_prompts_own_contrast() -> None:
    guidance = Guidance(
        classifier_free=ClassifierFree(scale=5.0),
        skip_layers=SkipLayerGuidance(scale=3.0, start=0, end=1, rescale=1.0),
    )
    guided = guidance.combine(X, 0.5, Predictions(COND, UNCOND, SKIPPED))
    torch.testing.assert_close(deviations(guided.denoised), deviations(COND))


def test_predictions_without_contrast_give_no_nan() -> None:
    """Such as those of prompts that hold nowhere, which are 0."""
    nothing = torch.zeros(SHAPE)
    guidance = Guidance(
        classifier_free=ClassifierFree(scale=5.0, rescale=0.7),
        skip_layers=SkipLayerGuidance(scale=3.0, start=0, end=1, rescale=1.0),
    )
    assert not guidance.combine(nothing, 0.5, Predictions(nothing, nothing, nothing)).denoised.any()
    assert guidance.combine(X, 0.5, Predictions(nothing, nothing, nothing)).denoised.isfinite().all()


@pytest.mark.parametrize("slg", [SkipLayerGuidance(scale=0.0), SkipLayerGuidance(layers=())])
def test_skip_layer_guidance_that_does_nothing_makes_no_call(slg: SkipLayerGuidance) -> None:
    assert Guidance(skip_layers=slg).passes(percent_to_sigma(0.1)) == ("cond", "uncond")


@pytest.mark.parametrize(
    ("kind", "settings", "text"),
    [
        (ClassifierFree, {"scale": float("nan")}, "finite"),
        (ClassifierFree, {"scale": float("inf")}, "finite"),
        (ClassifierFree, {"rescale": 1.5}, "rescale=1.5"),
        (ClassifierFree, {"start": 0.5, "end": 0.5}, "start < end"),
        (SkipLayerGuidance, {"start": -0.1}, "start < end"),
        (SkipLayerGuidance, {"end": 1.1}, "start < end"),
        (SkipLayerGuidance, {"layers": (7, -1)}, "counted from 0"),
        (SkipLayerGuidance, {"scale": float("-inf")}, "finite"),
    ],
)
def test_settings_are_checked_at_birth(kind: Any, settings: dict[str, Any], text: str) -> None:
    with pytest.raises(RequestError, match=text):
        kind(**settings)
