"""What sampling nodes do beside the recorded runs: progress, cancelling, masks, and what they refuse."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from octavo.errors import OctavoError, RequestError, WrongModelError
from octavo.graph.context import Context
from octavo.graph.nodes import model_edits, sampling
from octavo.graph.nodes.types import Conditions, Guider, Latent, ModelLink, Noise, Sigmas
from octavo.pipeline.conditions import Condition
from octavo.pipeline.encode import Conditioning
from octavo.pipeline.run import Run, Watch, solve
from octavo.sampling import SkipLayerGuidance, get_sampler, percent_to_sigma
from tests.graph.nodes.runs import MODEL, context_with, use, write_recorded_model
from tests.graph.nodes.runs import run as run_workflow
from tests.pipeline.recorded import recorded, told

EMPTY: Latent = {"samples": torch.zeros(1, 16, 8, 8)}
FALLING: Sigmas = (1.0, 0.75, 0.4, 0.0)
FIRST = Noise(seed=1)


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Context:
    return context_with(write_recorded_model(tmp_path_factory.mktemp("models")))


@pytest.fixture
def model(context: Context) -> ModelLink:
    return ModelLink.of(context.shelf.diffusion_model(MODEL))


def text(name: str) -> Conditions:
    return (Condition(conditioning=told(name)),)


def guider(model: ModelLink, scale: float = 1.0) -> Guider:
    return Guider(model=model, positive=text("pos"), negative=None if scale == 1 else text("neg"), scale=scale)


def walk(
    context: Context,
    by: Guider,
    *,
    sampler: str = "euler",
    sigmas: Sigmas = FALLING,
    latent: Latent = EMPTY,
    noise: Noise = FIRST,
) -> Tensor:
    return sampling.walk(context, by, get_sampler(sampler), sigmas, latent, noise)[0]["samples"]


def picture() -> Latent:
    return {"samples": recorded()["in/latent"]}


# What is told on the way


def test_progress_counts_evaluations_and_shows_the_estimate(context: Context, model: ModelLink) -> None:
    told: list[tuple[float, float, Any]] = []
    listening = replace(context, report=lambda *report: told.append(report))
    walk(listening, guider(model), sigmas=(1.0, 0.75, 0.4, 0.0), sampler="heun")
    assert [(value, most) for value, most, _ in told] == [(k, 5) for k in range(1, 6)]
    shown = told[-1][2]()
    assert isinstance(shown, Image.Image)
    assert shown.size == (8, 8)  # a pixel of a released model's preview is one of its latents


def test_a_run_is_told_by_the_graph_step_by_step(context: Context) -> None:
    messages: list[tuple[str, dict[str, Any]]] = []
    prompt = {
        "model": use("UNETLoader", unet_name=MODEL, weight_dtype="default"),
        "text": use("RecordedText", name="pos"),
        "start": use("EmptySD3LatentImage", width=64, height=64, batch_size=1),
        "sampler": use(
            "KSampler",
            model=["model", 0], positive=["text", 0], negative=["text", 0], latent_image=["start", 0],
            seed=0, steps=3, cfg=1.0, sampler_name="euler", scheduler="simple", denoise=1.0,
        ),
        "out": use("Keep", value=["sampler", 0]),
    }  # fmt: skip
    run_workflow(prompt, context, lambda *message: messages.append(message))
    progress = [data for kind, data in messages if kind == "progress"]
    assert [(data["node"], data["value"], data["max"]) for data in progress] == [("sampler", k, 3) for k in (1, 2, 3)]


class StopError(OctavoError):
    """Somebody wants the run to end."""


def test_cancelling_takes_effect_between_two_evaluations(context: Context, model: ModelLink) -> None:
    asked: list[int] = []

    def check() -> None:
        asked.append(len(asked))
        if len(asked) > 2:
            raise StopError

    with pytest.raises(StopError):
        walk(replace(context, check=check), guider(model), sigmas=tuple(1 - k / 20 for k in range(21)))
    assert len(asked) == 3


def test_work_is_given_to_those_who_own_the_device(context: Context, model: ModelLink) -> None:
    """`solve` walks, and is handed the seed, the sampler and tensors where the model is."""
    runs: list[Run] = []

    def other_solve(run: Run, watch: Watch) -> Tensor:
        runs.append(run)
        return solve(run, watch)

    walk(replace(context, solve=other_solve), guider(model), noise=Noise(seed=5))
    (run,) = runs
    assert (run.seed, run.sampler.name, tuple(run.sigmas)) == (5, "euler", FALLING)
    assert run.x.device == context.shelf.device


# What is kept


def test_what_a_mask_keeps_is_the_picture(context: Context, model: ModelLink) -> None:
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., :32] = 1
    latent: Latent = {**picture(), "noise_mask": mask}
    out = walk(context, guider(model), latent=latent)
    torch.testing.assert_close(out[..., 5:], recorded()["in/latent"][..., 5:], atol=1e-5, rtol=0)
    assert not torch.allclose(out[..., :3], recorded()["in/latent"][..., :3], atol=1e-2)


def test_masks_and_places_in_the_batch_go_on_with_the_latents(context: Context, model: ModelLink) -> None:
    mask = torch.ones(1, 1, 64, 64)
    latent: Latent = {"samples": torch.zeros(1, 16, 8, 8), "noise_mask": mask, "batch_index": [2]}
    out, denoised = sampling.walk(context, guider(model), get_sampler("euler"), FALLING, latent, Noise(seed=1))
    for each in (out, denoised):
        assert each["noise_mask"] is mask
        assert each["batch_index"] == [2]


def test_masks_fewer_than_pictures_are_repeated(context: Context, model: ModelLink) -> None:
    """Of three pictures with two masks, the third has the first mask."""
    masks = torch.zeros(2, 1, 8, 8)
    masks[1] = 1
    latent: Latent = {"samples": recorded()["in/latent"].expand(3, -1, -1, -1), "noise_mask": masks}
    out = walk(context, guider(model), latent=latent)
    kept = [torch.allclose(row, recorded()["in/latent"][0], atol=1e-5) for row in out]
    assert kept == [True, False, True]


def test_nothing_that_was_given_is_changed(context: Context, model: ModelLink) -> None:
    latent = picture()
    before = latent["samples"].clone()
    walk(context, guider(model), latent=latent)
    assert torch.equal(latent["samples"], before)


@pytest.mark.parametrize("sigmas", [(), (0.0,)])
def test_without_a_step_the_latents_stay(context: Context, model: ModelLink, sigmas: Sigmas) -> None:
    out = walk(context, guider(model), latent=picture(), sigmas=sigmas)
    torch.testing.assert_close(out, recorded()["in/latent"], atol=1e-6, rtol=0)


def test_steps_that_lead_nowhere_are_not_made(context: Context, model: ModelLink) -> None:
    plain = walk(context, guider(model), sampler="dpmpp_2m")
    repeated = walk(context, guider(model), sampler="dpmpp_2m", sigmas=(1.0, 1.0, 0.75, 0.4, 0.4, 0.0))
    assert torch.equal(plain, repeated)


def test_going_up_and_down_again_leads_back(context: Context, model: ModelLink) -> None:
    """Euler's error is of order 1: with twice the steps the way back ends at half the distance."""

    def distance(steps: int) -> float:
        up = tuple(0.2 + 0.4 * k / steps for k in range(steps + 1))
        silent = Noise(seed=0, silent=True)
        there = walk(context, guider(model), sigmas=up, latent=picture(), noise=silent)
        back = walk(context, guider(model), sigmas=up[::-1], latent={"samples": there}, noise=silent)
        return (back - recorded()["in/latent"]).norm().item()

    assert math.log2(distance(8) / distance(16)) == pytest.approx(1, abs=0.2)


def test_skip_layer_guidance_keeps_its_levels_when_the_shift_is_set_after_it(
    context: Context, model: ModelLink
) -> None:
    """ComfyUI's node turns percents into levels at once, by the shift of then."""
    seen: list[SkipLayerGuidance] = []

    def spy(run: Run, watch: Watch) -> Tensor:
        assert run.track.guidance.skip_layers is not None
        seen.append(run.track.guidance.skip_layers)
        return solve(run, watch)

    inputs = {"layers": "0", "scale": 3.0, "start_percent": 0.1, "end_percent": 0.5}
    (skipping,) = model_edits.skip_layer_guidance_sd3.run(context, model=model, **inputs)
    (shifted,) = model_edits.model_sampling_sd3.run(context, model=skipping, shift=5.0)
    walk(replace(context, solve=spy), guider(shifted))
    assert percent_to_sigma(seen[0].start, 5.0) == pytest.approx(percent_to_sigma(0.1, 3.0))
    assert percent_to_sigma(seen[0].end, 5.0) == pytest.approx(percent_to_sigma(0.5, 3.0))
    walk(replace(context, solve=spy), guider(skipping))
    assert (seen[1].start, seen[1].end) == (0.1, 0.5)


# What is refused


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "levels of other models": ({"sigmas": (14.6, 7.0, 0.0)}, "between 0 and 1"),
    "levels that are no numbers": ({"sigmas": (1.0, math.nan, 0.0)}, "between 0 and 1"),
    "levels that cannot be told from 0": ({"sigmas": (1.0, 1e-7, 0.0)}, "too low"),
    "more levels than a run can have": ({"sigmas": tuple(1 - k / 11_000 for k in range(11_001))}, "at most 10000"),
    "levels that rise and fall": ({"sigmas": (1.0, 0.3, 0.5, 0.0)}, "one way"),
    "levels that rise, with a sampler that draws": (
        {"sigmas": (0.1, 0.5), "sampler": "euler_ancestral"},
        "only goes down",
    ),
    "levels that rise from 0": ({"sigmas": (0.0, 0.5)}, "rise from 0"),
    "levels that end in noise alone": ({"sigmas": (1.0,)}, "end at 1"),
    "CFG++ without a negative": ({"sampler": "euler_cfg_pp"}, "CFGGuider"),
    "latents of another model": ({"latent": {"samples": torch.ones(1, 4, 8, 8)}}, "4 channels"),
    "latents of a video": ({"latent": {"samples": torch.zeros(1, 16, 2, 8, 8)}}, "shape"),
    "no latents": ({"latent": {"samples": torch.zeros(0, 16, 8, 8)}}, "shape"),
    "latents beyond the model's positions": ({"latent": {"samples": torch.zeros(1, 16, 8, 66)}}, "512 pixels a side"),
    "places in the batch that are not those of the rows": (
        {"latent": {"samples": torch.zeros(1, 16, 8, 8), "batch_index": [0, 1]}},
        "batch_index",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_walked_is_refused_with_a_reason(context: Context, model: ModelLink, what: str) -> None:
    given, reason = REFUSED[what]
    with pytest.raises(RequestError, match=reason):
        walk(context, guider(model), **given)


def test_pictures_beyond_the_servers_limit_are_refused(context: Context, model: ModelLink) -> None:
    with pytest.raises(RequestError, match="4095"):
        walk(replace(context, max_pixels=4095), guider(model))
    walk(replace(context, max_pixels=4096), guider(model))


def test_texts_that_were_encoded_for_another_model_are_refused(context: Context, model: ModelLink) -> None:
    foreign = (Condition(conditioning=Conditioning(torch.zeros(1, 77, 768), torch.zeros(1, 768))),)
    with pytest.raises(WrongModelError, match="768"):
        walk(context, Guider(model=model, positive=foreign, negative=None, scale=1.0))


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [({"steps": 5000, "denoise": 0.01}, "10000"), ({"sampler_name": "eulre"}, "euler"), ({"scheduler": "x"}, "simple")],
)
def test_what_the_sampling_room_refuses_is_the_nodes_error(
    context: Context, model: ModelLink, inputs: dict[str, Any], reason: str
) -> None:
    given = {"seed": 0, "steps": 2, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    links = {"model": model, "positive": text("pos"), "negative": text("neg"), "latent_image": EMPTY}
    with pytest.raises(RequestError, match=reason):
        sampling.ksampler.run(context, **{**given, **links, **inputs})


def test_a_worker_that_has_gradients_on_samples_as_well(context: Context, model: ModelLink) -> None:
    with torch.enable_grad():
        assert not walk(context, guider(model)).requires_grad
