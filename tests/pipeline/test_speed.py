"""Speed levels: what is forecast, when, how close it is, and that exact is exact."""

import logging
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from octavo import GenerateRequest
from octavo.errors import RequestError
from octavo.pipeline.denoise import Question, Track
from octavo.pipeline.request import Job
from octavo.pipeline.run import Run, Step, Walk, solve
from octavo.pipeline.speed import EXACT, SPEEDS, Forecast, Speed
from octavo.sampling import SAMPLERS, Guided, SkipLayerGuidance, get_sampler
from tests.engine.fake_model import FakeModel, Loaded, a_run, prompt
from tests.pipeline.recorded import plain, tiny_mmdit
from tests.pipeline.test_run import run_of

LEVELS = [0.95, 0.9, 0.8, 0.65, 0.5, 0.4, 0.25, 0.1]
ANY = Speed(name="any", tolerance=1e9, most=99)
X = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))


def asked(sigma: float, track: Track | None = None, *, needs_uncond: bool = False) -> Question:
    return Question(X, sigma, TRACK if track is None else track, needs_uncond)


TRACK = plain()


def told(velocity: Tensor, sigma: float, uncond: Tensor | None = None) -> Guided:
    denoised = X - sigma * velocity
    return Guided(denoised, denoised if uncond is None else X - sigma * uncond)


def test_the_exact_level_is_the_default_and_forecasts_nothing() -> None:
    assert run_of("euler").speed is EXACT
    assert Forecast.of(EXACT, 20) is None
    assert GenerateRequest(prompt="a star").speed is None


def test_a_velocity_on_a_line_is_foretold_to_rounding_with_and_without_guidance() -> None:
    start, slope = torch.randn(2, 1, 16, 8, 8, generator=torch.Generator().manual_seed(1))
    forecast = Forecast(ANY, 20)
    for sigma in LEVELS[:3]:
        question = asked(sigma, needs_uncond=True)
        assert forecast.answer(question, 5) is None
        forecast.learn(question, told(start + sigma * slope, sigma, start - sigma * slope))
    for sigma in LEVELS[3:]:
        found, wanted = forecast.answer(asked(sigma, needs_uncond=True), 5), start + sigma * slope
        assert found is not None
        # Numbers below 8 are kept, divided by levels down to 0.8 and reached for with weights below 8.
        torch.testing.assert_close(found.denoised, X - sigma * wanted, atol=2e-4, rtol=0)
        torch.testing.assert_close(found.uncond, X - sigma * (start - sigma * slope), atol=2e-4, rtol=0)


@pytest.mark.parametrize("most", [1, 2, 5])
def test_the_first_three_and_the_last_are_made_and_no_more_than_so_many_are_forecast_in_a_row(most: int) -> None:
    forecast = Forecast(replace(ANY, most=most), len(LEVELS))
    made = []
    for done, sigma in enumerate(LEVELS):
        if forecast.answer(asked(sigma), done) is None:
            forecast.learn(asked(sigma), told(torch.ones_like(X) * (1 + sigma), sigma))
            made.append(done)
    assert made == {1: [0, 1, 2, 4, 6, 7], 2: [0, 1, 2, 5, 7], 5: [0, 1, 2, 7]}[most]


@pytest.mark.parametrize("factor", [0.99, 1.01])
def test_the_estimate_of_a_velocity_on_a_parabola_is_its_error(factor: float) -> None:
    """Of c σ² a line through a and b misses c (σ - a) (σ - b); relative to the velocity at the last level, c b²."""
    first, last, sigma = LEVELS[1:4]
    error = (last - sigma) * (first - sigma) / last**2
    forecast = Forecast(replace(ANY, tolerance=factor * error), 20)
    bend = torch.randn(X.shape, generator=torch.Generator().manual_seed(2))
    for level in LEVELS[:3]:
        forecast.learn(asked(level), told(bend * level**2, level))
    found = forecast.answer(asked(sigma), 5)
    assert (found is not None) == (factor > 1)
    if found is not None:
        missed = (X - found.denoised) / sigma - bend * sigma**2
        assert missed.norm().item() == pytest.approx(error * (bend * last**2).norm().item(), rel=1e-3)


def test_estimates_add_up_until_the_model_is_asked_again() -> None:
    reach = [(LEVELS[2] - sigma) * (LEVELS[1] - sigma) / LEVELS[2] ** 2 for sigma in LEVELS[3:6]]
    forecast = Forecast(replace(ANY, tolerance=sum(reach[:2]) * 1.01), 20)
    for level in LEVELS[:3]:
        forecast.learn(asked(level), told(torch.ones_like(X) * level**2, level))
    assert [forecast.answer(asked(sigma), 5) is not None for sigma in LEVELS[3:6]] == [True, True, False]


def test_a_second_look_at_a_level_and_a_higher_one_are_never_forecast() -> None:
    forecast = Forecast(ANY, 20)
    for level in LEVELS[:3]:
        forecast.learn(asked(level), told(torch.ones_like(X), level))
    assert forecast.answer(asked(LEVELS[2]), 5) is None
    assert forecast.answer(asked(LEVELS[1]), 5) is None
    # The second look takes the first one's place.
    forecast.learn(asked(LEVELS[2]), told(2 * torch.ones_like(X), LEVELS[2]))
    found = forecast.answer(asked(LEVELS[3]), 5)
    assert found is not None
    ahead = (LEVELS[3] - LEVELS[2]) / (LEVELS[2] - LEVELS[1])
    torch.testing.assert_close(X - found.denoised, torch.full_like(X, (2 + ahead) * LEVELS[3]), atol=1e-5, rtol=0)
    # After a higher level nothing of before counts.
    forecast.learn(asked(0.9), told(torch.ones_like(X), 0.9))
    assert forecast.answer(asked(0.5), 5) is None


def test_where_other_passes_begin_or_end_nothing_is_carried_over() -> None:
    """Skip-layer guidance acts down to a level: past it the velocity is another function."""
    skip = SkipLayerGuidance(layers=(0,), start=0.0, end=0.5)
    guided = replace(TRACK, guidance=replace(TRACK.guidance, skip_layers=skip), tables={}, arranged={})
    forecast, made = Forecast(ANY, 20), []
    for sigma in [0.99, 0.97, 0.95, 0.93, 0.91, 0.3, 0.25, 0.2, 0.15, 0.1]:
        question = asked(sigma, guided)
        if forecast.answer(question, 5) is None:
            forecast.learn(question, told(torch.ones_like(X), sigma))
            made.append(sigma)
    assert made == [0.99, 0.97, 0.95, 0.3, 0.25, 0.2]


def calls_of(run: Run) -> tuple[Tensor, list[Step], int]:
    """Result, steps told, and calls of the model."""
    steps: list[Step] = []
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    model = tiny_mmdit()
    handle = model.register_forward_pre_hook(count)
    try:
        return solve(run, steps.append), steps, calls
    finally:
        handle.remove()


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_every_sampler_walks_all_its_steps_with_fewer_calls(name: str) -> None:
    run = replace(run_of(name), sigmas=run_of(name, steps=12).sigmas, speed=Speed(name="any", tolerance=1e9, most=2))
    result, steps, calls = calls_of(run)
    assert result.isfinite().all()
    assert steps[-1].done == calls + steps[-1].forecast
    if get_sampler(name).adaptive:
        assert steps[-1].forecast == 0
    else:
        assert steps[-1].done == steps[-1].total == len(get_sampler(name).calls(run.sigmas))
        # heunpp2 looks two levels ahead and comes back at every step.
        assert (steps[-1].forecast > 0) == (name != "heunpp2")
        assert len(steps) == calls + 1, "told at the start and after each call"


def test_a_run_ends_as_close_to_the_exact_one_as_its_tolerance_says() -> None:
    """A velocity whose slope in x is at most L carries an error of velocities on by no more than exp(L) in all.

    The fake model's is 0.6 from its sine and 0.1 from its prompt of 1; estimates count as good to a factor of two.
    """
    model = FakeModel()
    run = a_run(Loaded(model), steps=40, text=prompt(1.0))
    exact = solve(run, lambda _step: None)
    biggest = 0.2 * exact[0].numel() ** 0.5 + 0.1 * run.x.norm().item() + 0.3 * 2 * exact[0].numel() ** 0.5
    made = []
    for tolerance in (1e-4, 1e-3, 1e-2, 1e-1):
        model.calls.clear()
        result = solve(replace(run, speed=Speed(name="some", tolerance=tolerance, most=9)), lambda _step: None)
        assert (result - exact).norm().item() <= 2 * math.exp(0.7) * tolerance * biggest
        made.append(len(model.calls))
    assert made == sorted(made, reverse=True)
    assert 3 < made[-1] < 20 < made[0] < 40


def test_what_is_kept_stays_kept() -> None:
    run = replace(run_of("euler", steps=12, inpaint=True), speed=Speed(name="any", tolerance=1e9, most=2))
    result, steps, _ = calls_of(run)
    assert steps[-1].forecast > 0
    assert run.inpaint is not None
    kept = (run.inpaint.mask == 0).expand_as(result)
    assert torch.allclose(result[kept], run.inpaint.latents[kept], atol=1e-6)


def test_a_sampler_that_chooses_as_it_goes_is_left_exact_and_it_is_said(caplog: pytest.LogCaptureFixture) -> None:
    run = run_of("dpm_adaptive")
    with caplog.at_level(logging.INFO, "octavo.pipeline.speed"):
        quick, _, _ = calls_of(replace(run, speed=SPEEDS["fast"]))
    assert torch.equal(quick, calls_of(run)[0])
    assert "forecasts nothing" in caplog.text


def test_what_was_known_leaves_with_the_run() -> None:
    with torch.inference_mode():
        walk = Walk(replace(run_of("euler"), speed=SPEEDS["fast"]))
        assert walk._forecast is not None
        while walk.question is not None:
            walk.answer(Guided(walk.question.x, walk.question.x))
        assert walk._forecast is None


@pytest.mark.parametrize("speed", ["slow", "", "EXACT", 3])
def test_no_other_speeds_are_taken(speed: str) -> None:
    with pytest.raises(RequestError, match="choose exact, balanced, fast"):
        GenerateRequest(prompt="a star", speed=speed)


def test_a_job_says_its_speed() -> None:
    assert "speed" in Job.__dataclass_fields__
    again = GenerateRequest.from_settings(GenerateRequest(prompt="a star", speed="fast").settings)
    assert again.speed == "fast"
