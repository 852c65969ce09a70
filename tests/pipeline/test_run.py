"""Runs that keep part of a picture, stop early or go on; and the seam between a run and who answers its questions."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.errors import NumericsError, RequestError
from octavo.models.vae import from_latents
from octavo.pipeline.denoise import denoise
from octavo.pipeline.run import Inpaint, Run, Step, Walk, inpaint_noise, solve, stretch
from octavo.sampling import SAMPLERS, SkipLayerGuidance, get_sampler, initial_noise
from octavo.sampling.flow import add_noise
from tests.goldens import golden
from tests.pipeline.recorded import SHAPE, cfg, latents, levels, plain, recorded, tiny_mmdit
from tests.pipeline.test_conditions import RECORDED
from tests.pipeline.test_whole_runs import RUNS


def image() -> Tensor:
    return recorded()["in/latent"]


def mask() -> Tensor:
    return F.interpolate(recorded()["in/mask_pixels"][None], size=(8, 8), mode="bilinear")


def close(got: Tensor, name: str) -> None:
    torch.testing.assert_close(got, recorded()[f"out/{name}"], atol=1e-4, rtol=0)


# By case: sampler and denoise.
INPAINTED = {
    "inpaint_mask": ("euler", 0.8),
    "inpaint_mask_denoise1": ("euler", 1.0),
    "inpaint_ddim": ("ddim", 1.0),
}


@pytest.mark.parametrize("case", INPAINTED)
def test_inpainting_equals_comfyui(case: str) -> None:
    sampler, share = INPAINTED[case]
    close(latents(plain(), levels(4, denoise=share), start=image(), mask=mask(), sampler=sampler), case)


def test_stages_of_a_run_equal_comfyui() -> None:
    """KSamplerAdvanced: stopped with noise left, gone on, forced to end, from the middle to before the end."""
    six = levels(6)
    first = latents(plain(), stretch(six, 0, 3))
    close(first, "adv_first_half")
    close(latents(plain(), stretch(six, 3, 10000), start=first, noisy=False), "adv_second_half")
    close(latents(plain(), stretch(six, 0, 3, to_zero=True)), "adv_force_full_denoise")
    close(latents(plain(), stretch(six, 2, 5), start=image(), seed=5), "adv_middle_img")


def test_the_last_estimate_of_a_run_that_stops_early_equals_comfyui() -> None:
    steps: list[Step] = []
    close(latents(plain(), levels(4)[:4], watch=steps.append), "custom_advanced_3_of_4")
    assert steps[-1].denoised is not None
    close(from_latents(steps[-1].denoised), "custom_advanced_3_of_4_denoised")


def test_every_recorded_run_is_held() -> None:
    """None of ComfyUI's cases is left out of the tests of this folder."""
    stages = {"adv_first_half", "adv_second_half", "adv_force_full_denoise", "adv_middle_img", "custom_advanced_3_of_4"}
    cases = json.loads(golden("comfyui/pipeline.json").read_text())["cases"]
    assert set(cases) == {*RUNS, *RECORDED, *INPAINTED, *stages}


@pytest.mark.parametrize(
    ("first", "last", "to_zero", "left"),
    [
        (0, None, False, [1.0, 0.9, 0.7, 0.4, 0.0]),
        (0, 4, True, [1.0, 0.9, 0.7, 0.4, 0.0]),
        (1, 3, False, [0.9, 0.7, 0.4]),
        (1, 3, True, [0.9, 0.7, 0.0]),
        (3, 10000, True, [0.4, 0.0]),
        (4, None, False, []),
        (0, 0, True, []),
        (2, 1, False, []),
    ],
)
def test_a_stretch_has_one_level_more_than_steps(
    first: int, last: int | None, to_zero: bool, left: list[float]
) -> None:
    assert stretch([1.0, 0.9, 0.7, 0.4, 0.0], first, last, to_zero=to_zero) == left


def test_steps_are_not_counted_from_below_zero() -> None:
    with pytest.raises(RequestError, match="counted from 0"):
        stretch([1.0, 0.0], -1)


def run_of(sampler: str, *, steps: int = 4, seed: int = 3, scale: float = 1.5, inpaint: bool = False) -> Run:
    spec, sigmas = get_sampler(sampler), levels(steps, sampler=sampler)
    noise = initial_noise(SHAPE, seed)
    start = torch.linspace(-1, 1, noise.numel()).view(SHAPE)
    return Run(
        mmdit=tiny_mmdit,
        track=plain(scale),
        sampler=spec,
        sigmas=sigmas,
        x=add_noise(start, noise, sigmas[0]),
        seed=seed,
        inpaint=Inpaint(mask=mask(), latents=start, noise=inpaint_noise(spec, noise, seed)) if inpaint else None,
    )


def test_what_is_kept_comes_out_as_it_was_and_the_rest_is_drawn() -> None:
    kept = torch.ones(SHAPE)
    whole = replace(run_of("euler", inpaint=True), x=initial_noise(SHAPE, 3))
    for share, same in ((0.0, True), (1.0, False)):
        inpaint = Inpaint(mask=torch.full((1, 1, 8, 8), share), latents=kept, noise=initial_noise(SHAPE, 3))
        got = solve(replace(whole, inpaint=inpaint), lambda _step: None)
        assert torch.allclose(got, kept, atol=1e-6) is same
    without = solve(replace(whole, inpaint=None), lambda _step: None)
    torch.testing.assert_close(got, without, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_runs_in_company_end_where_they_end_alone(name: str) -> None:
    """Three runs of unlike length, seed, guidance and masks, answered together step by step.

    Only the order in which a product's terms are summed may differ with the number of rows; a run carries such
    differences on, so they are larger at its end than in one call.
    """
    runs = [
        run_of(name),
        run_of("euler", steps=3, seed=8, scale=3.0, inpaint=True),
        run_of(name, steps=5, seed=9, scale=1.0, inpaint=True),
    ]
    alone = [solve(run, lambda _step: None) for run in runs]
    walks = [Walk(run) for run in runs]
    turns = 0
    while open_walks := [walk for walk in walks if walk.question is not None]:
        questions = [walk.question for walk in open_walks if walk.question is not None]
        for walk, guided in zip(open_walks, denoise(tiny_mmdit(), questions), strict=True):
            walk.answer(guided)
        turns += 1
    assert turns == max(walk.step.done for walk in walks)
    for walk, expected in zip(walks, alone, strict=True):
        torch.testing.assert_close(walk.result, expected, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2s_ancestral", "uni_pc"])
def test_the_watcher_is_told_of_the_start_and_of_every_evaluation(name: str) -> None:
    steps: list[Step] = []
    solve(run_of(name), steps.append)
    total = len(get_sampler(name).calls(levels(4, sampler=name)))
    assert [(step.done, step.total) for step in steps] == [(done, total) for done in range(total + 1)]
    assert steps[0].denoised is None
    assert all(step.denoised is not None and step.denoised.shape == SHAPE for step in steps[1:])


def test_a_sampler_that_chooses_as_it_goes_has_no_total() -> None:
    steps: list[Step] = []
    solve(run_of("dpm_adaptive"), steps.append)
    assert {step.total for step in steps} == {0}
    assert len(steps) > 4


def test_what_the_watcher_raises_ends_the_run() -> None:
    seen = 0

    def stop(step: Step) -> None:
        nonlocal seen
        seen = step.done
        if step.done == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        solve(run_of("euler", steps=6), stop)
    assert seen == 2


@pytest.mark.parametrize("name", ["euler", "dpmpp_sde", "dpm_adaptive"])
@pytest.mark.parametrize("sigmas", [[], [1.0], [0.0]])
def test_a_run_without_steps_ends_where_it_starts(name: str, sigmas: list[float]) -> None:
    run = replace(run_of(name), sigmas=sigmas)
    assert torch.equal(solve(run, lambda _step: None), run.x)


def test_numbers_that_a_sampler_spoils_are_an_error_that_names_it() -> None:
    run = run_of("euler")
    with pytest.raises(NumericsError, match="sampler euler gave NaN"):
        solve(replace(run, sigmas=[], x=run.x / 0), lambda _step: None)


def test_the_negative_prompt_gets_tables_only_where_it_is_asked_about() -> None:
    run = run_of("euler", scale=1.0)
    solve(run, lambda _step: None)
    assert {prompt for prompt, _ in run.track.tables} == {run.track.positive[0].conditioning}
    skip = SkipLayerGuidance(scale=2, layers=(0,), start=0, end=1)
    for guidance, prompts in ((cfg(2.0), 2), (cfg(1.0, skip=skip), 1)):
        track = replace(plain(), guidance=guidance)
        solve(replace(run, track=track), lambda _step: None)
        assert len({prompt for prompt, _ in track.tables}) == prompts


def test_prompts_are_brought_to_the_models_dtype() -> None:
    track = plain()
    doubled = track.to(torch.device("cpu"), torch.float64)
    assert doubled.positive[0].conditioning.context.dtype == torch.float64
    assert track.to(torch.device("cpu"), torch.float32) is track
    run = run_of("euler")
    expected = solve(run, lambda _step: None)
    assert torch.equal(solve(replace(run, track=plain(1.5).to(torch.device("cpu"), torch.float64)), print), expected)
