"""ControlNets on runs, against diffusers' recorded outputs and by what strength, time and company must do."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from octavo.checkpoint.load import load_controlnet
from octavo.errors import NumericsError, RequestError, WrongModelError
from octavo.models import ControlNet, MMDiT
from octavo.pipeline.conditions import Condition
from octavo.pipeline.control import Control
from octavo.pipeline.denoise import Question, Track, denoise, make_tables
from octavo.pipeline.encode import Conditioning
from octavo.pipeline.finite import denoise_finite
from octavo.pipeline.tables import Tables
from octavo.sampling import ClassifierFree, Guidance
from octavo.sampling.flow import denoised_from_velocity, percent_to_sigma
from tests.goldens import golden
from tests.models.test_controlnet import FILES, SCALE, STEERED
from tests.models.test_mmdit import diffusers_model

SHIFT = 3.0


@cache
def net(kind: str) -> ControlNet:
    loaded = load_controlnet(golden(f"diffusers/{FILES[kind]}.safetensors"))
    loaded.config = replace(loaded.config, last=False)  # as diffusers, which made the recordings, always has it
    return loaded


@cache
def model(kind: str) -> MMDiT:
    return diffusers_model(STEERED[kind])


def recorded(name: str) -> dict[str, Tensor]:
    return load_file(golden(f"diffusers/{name}_io.safetensors"))


def control(kind: str, hint: Tensor, **changes: float) -> Control:
    """The same `net` callable each time, so that rows can share it."""
    told = {"strength": SCALE} | changes
    return Control(net=GIVERS[kind], config=net(kind).config, name=f"{kind}.safetensors", hint=lambda _: hint, **told)


GIVERS = {"8b": lambda: net("8b"), "joint": lambda: net("joint")}


def track(prompt: Conditioning, *controls: Control, scale: float = 1.0, negative: Conditioning | None = None) -> Track:
    guidance = Guidance(classifier_free=ClassifierFree(scale=scale))
    uncontrolled = None if negative is None else [Condition(conditioning=negative)]
    positive = [Condition(conditioning=prompt, control=controls)]
    return Track(positive=positive, negative=uncontrolled, guidance=guidance, shift=SHIFT)


def prompts() -> list[tuple[Tensor, float, Conditioning]]:
    """Latents, sigma and prompt of the two recorded rows."""
    io = recorded("transformer_large_tiny")
    x, context, pooled = (io[f"in.{name}"] for name in ("hidden_states", "encoder_hidden_states", "pooled_projections"))
    times = io["in.timestep"].tolist()
    rows = [slice(i, i + 1) for i in range(len(times))]
    return [(x[i], time / 1000, Conditioning(context[i], pooled[i])) for i, time in zip(rows, times, strict=True)]


def answers(mmdit: MMDiT, questions: Sequence[Question]) -> list[Tensor]:
    with torch.inference_mode():
        return [guided.denoised for guided in denoise(mmdit, questions)]


@pytest.mark.parametrize("kind", FILES)
def test_the_estimates_are_those_of_diffusers_alone_and_in_company(kind: str) -> None:
    io = recorded(f"controlnet_{kind}_tiny")
    hints, velocities = (torch.chunk(io[name], 2) for name in ("in.controlnet_cond", "out.sample_with_controlnet"))
    questions = [
        Question(x, sigma, track(prompt, control(kind, hint)))
        for (x, sigma, prompt), hint in zip(prompts(), hints, strict=True)
    ]
    assert questions[0].shapes == questions[1].shapes, "one net with two pictures is one call"
    together = answers(model(kind), questions)
    for question, velocity, found in zip(questions, velocities, together, strict=True):
        expected = denoised_from_velocity(question.x, velocity, question.sigma)
        assert (found - expected).abs().max() < 2e-5
        assert (answers(model(kind), [question])[0] - expected).abs().max() < 2e-5


def test_several_nets_add_up_and_strength_scales_what_each_adds() -> None:
    """The residuals enter linearly, so two halves of a net are the whole of it, and none is nothing."""
    x, sigma, prompt = prompts()[0]
    hint = recorded("controlnet_8b_tiny")["in.controlnet_cond"][:1]

    def found(*strengths: float) -> Tensor:
        held = track(prompt, *(control("8b", hint, strength=strength) for strength in strengths))
        return answers(model("8b"), [Question(x, sigma, held)])[0]

    assert (found(0.3, 0.4) - found(0.7)).abs().max() < 1e-5
    assert torch.equal(found(0.0), found())
    assert (found(0.7) - found()).abs().max() > 1e-2


@pytest.mark.parametrize(("start", "end"), [(0.0, 0.5), (0.5, 1.0), (0.2, 0.7)])
def test_it_acts_between_start_and_end_alone(start: float, end: float) -> None:
    x, _, prompt = prompts()[0]
    hint = recorded("controlnet_8b_tiny")["in.controlnet_cond"][:1]
    for percent in (0.1, 0.4, 0.6, 0.9):
        sigma = percent_to_sigma(percent, SHIFT)
        with_net = track(prompt, control("8b", hint, start=start, end=end))
        (steered,), (plain,) = (answers(model("8b"), [Question(x, sigma, t)]) for t in (with_net, track(prompt)))
        assert torch.equal(steered, plain) == (not start <= percent <= end)


def test_rows_with_and_without_control_share_no_call_and_each_is_as_alone() -> None:
    (x, sigma, prompt), (_, _, other) = prompts()
    hint = recorded("controlnet_8b_tiny")["in.controlnet_cond"][:1]
    questions = [
        Question(x, sigma, track(prompt, control("8b", hint), scale=3.0, negative=other)),
        Question(x, sigma, track(prompt)),
        Question(x, sigma, track(other, control("8b", hint.flip(-1)))),
    ]
    assert not questions[1].shapes & questions[2].shapes
    for together, question in zip(answers(model("8b"), questions), questions, strict=True):
        assert (together - answers(model("8b"), [question])[0]).abs().max() < 1e-5


def test_a_condition_in_an_area_sees_that_part_of_the_picture() -> None:
    x, sigma, prompt = prompts()[0]
    hint = recorded("controlnet_8b_tiny")["in.controlnet_cond"][:1]
    elsewhere = hint.clone()
    elsewhere[..., 8:] = 5.0

    def found(picture: Tensor) -> Tensor:
        part = Condition(conditioning=prompt, control=(control("8b", picture),), area=(12, 8, 0, 0))
        plain = track(prompt)
        return answers(model("8b"), [Question(x, sigma, replace(plain, positive=[part]))])[0][..., :8]

    assert torch.equal(found(hint), found(elsewhere))
    assert not torch.equal(found(hint), found(hint.flip(-1)))


def test_tables_are_made_once_for_model_and_net_and_serve_the_next_run() -> None:
    (_, _, prompt), cache_of_tables = prompts()[0], Tables()
    hint = recorded("controlnet_8b_tiny")["in.controlnet_cond"][:1]
    first, second = (track(prompt, control("8b", hint)) for _ in range(2))
    with torch.inference_mode():
        make_tables(model("8b"), first, [0.9, 0.5], cache=cache_of_tables)
        made = cache_of_tables.misses
        make_tables(model("8b"), second, [0.9, 0.5], cache=cache_of_tables)
    assert (made, cache_of_tables.misses, cache_of_tables.hits) == (2, 2, 2)
    assert len(first.tables) == 4


def test_a_net_for_another_model_is_refused() -> None:
    _, _, prompt = prompts()[0]
    mine = control("8b", torch.zeros(1, 16, 12, 20))
    wide = replace(mine, config=replace(mine.config, width=256))
    with pytest.raises(WrongModelError, match=r"'8b\.safetensors' steers models of width 256"):
        make_tables(model("8b"), track(prompt, wide), [0.5])
    inpainting = replace(mine, config=replace(mine.config, control_channels=17))
    with pytest.raises(WrongModelError, match="17 channels of control"):
        make_tables(model("8b"), track(prompt, inpainting), [0.5])


@pytest.mark.parametrize("wrong", [{"strength": -0.1}, {"strength": float("nan")}, {"start": -1.0}, {"end": 1.1}])
def test_numbers_out_of_range_name_the_net(wrong: dict[str, float]) -> None:
    with pytest.raises(RequestError, match=r"'8b\.safetensors'"):
        control("8b", torch.zeros(1, 16, 12, 20), **wrong)


def test_a_net_that_gives_nan_is_named_with_its_layer() -> None:
    x, sigma, prompt = prompts()[0]
    broken = load_controlnet(golden(f"diffusers/{FILES['8b']}.safetensors"))
    broken.outputs[1].bias.data[3] = torch.inf
    hint = recorded("controlnet_8b_tiny")["in.controlnet_cond"][:1]
    mine = replace(control("8b", hint), net=lambda: broken)
    with torch.inference_mode(), pytest.raises(NumericsError, match=r"'outputs\.1 of the ControlNet 8b\.safetensors'"):
        denoise_finite(model("8b"), Question(x, sigma, track(prompt, mine)), evaluation=1)


def test_rows_cut_apart_by_a_limit_keep_their_pictures() -> None:
    """Calls of at most one row at a time answer as one call of all does."""
    hints = torch.chunk(recorded("controlnet_8b_tiny")["in.controlnet_cond"], 2)
    questions = [
        Question(x, sigma, track(prompt, control("8b", hint, strength=strength)))
        for (x, sigma, prompt), hint, strength in zip(prompts(), hints, (0.3, 1.5), strict=True)
    ]
    with torch.inference_mode():
        cut = [guided.denoised for guided in denoise(model("8b"), questions, most_rows=1)]
    for alone, together in zip(cut, answers(model("8b"), questions), strict=True):
        assert (alone - together).abs().max() < 1e-5
