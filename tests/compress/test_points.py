"""Points of calibration are what a run of the model goes through, spread over the schedule and over the prompts."""

from collections import Counter
from pathlib import Path

import pytest
import torch

import octavo
from octavo.checkpoint.source import open_source
from octavo.compress import points as module
from octavo.compress.blocks import BlockStream
from octavo.compress.calibrate import calibrate, set_up
from octavo.compress.points import GROUPS, Points, choose_steps
from octavo.compress.prompts import GATE, calibration_prompts, gate_prompts, read_prompts
from octavo.errors import RequestError
from octavo.pipeline.denoise import Question, Track, denoise, make_tables
from octavo.pipeline.encode import encode
from octavo.pipeline.latents import latent_shape
from octavo.sampling import get_sampler, initial_noise, sample
from tests.compress.small import PROMPTS, model, settings


@pytest.mark.parametrize("steps", [1, 3, 4, 28])
def test_every_prompt_is_looked_at_once_in_every_part_of_the_schedule(steps: int) -> None:
    chosen = choose_steps(28, steps, tokens=64)
    assert len(chosen) == 28
    for picked in chosen:
        assert len({step * GROUPS // steps for step in picked}) == len(picked) == min(GROUPS, steps)
    # The steps of a part take turns.
    assert set().union(*chosen) == set(range(steps))


def test_large_pictures_give_fewer_points_evenly_spread_over_the_schedule() -> None:
    tokens = module.TOKENS // 80  # room for 40 guided points
    counts = Counter(step * GROUPS // 28 for picked in choose_steps(128, 28, tokens=tokens) for step in picked)
    assert sum(counts.values()) == 40
    assert max(counts.values()) - min(counts.values()) <= 1


def test_points_lie_on_the_pipelines_own_runs(tmp_path: Path) -> None:
    """Every point's latents, and where the run goes from there, are those of the sampler with the same settings."""
    asked = settings(tmp_path, steps=4, guidance_scale=3.0, seed=5)
    path = model(tmp_path / "models")
    components = octavo.load(path, models_dir=tmp_path / "models", device="cpu")
    with open_source(path) as source, torch.inference_mode():
        stream = BlockStream(source.require("mmdit"), torch.device("cpu"), torch.float32)
        setup = set_up(source, stream, asked)
        found = calibrate(stream, components, setup, folder=tmp_path, source="", report=lambda *_: None)
        runs = setup.runs
        for number, prompt in enumerate(PROMPTS):
            sides = encode(components.text, prompt), encode(components.text, "")
            track = Track.of(*sides, guidance=runs.guidance, shift=runs.shift)
            make_tables(components.mmdit(), track, runs.sigmas[:-1])
            visited: dict[float, torch.Tensor] = {}

            def answer(x: torch.Tensor, sigma: float, track: Track = track, visited: dict = visited) -> torch.Tensor:  # type: ignore[type-arg]
                visited[round(sigma, 5)] = x
                return denoise(components.mmdit(), [Question(x, sigma, track)])[0].denoised

            noise = initial_noise(latent_shape(64, 64), 5 + number)
            sample(get_sampler("euler")(noise, runs.sigmas, shift=runs.shift), answer)
            mine = [i for i in range(len(found.sigmas)) if int(found.prompts[i]) == number]
            assert len(mine) == 4
            for i in mine:
                expected = visited[round(float(found.sigmas[i]), 5)]
                torch.testing.assert_close(found.latents[i : i + 1], expected, rtol=1e-4, atol=1e-4)
    assert bool(found.guided.all())
    assert len(found.conditionings) == len(PROMPTS) + 1


def some_points() -> Points:
    generator = torch.Generator().manual_seed(0)
    told = [
        module.Conditioning(torch.randn(1, length, 8, generator=generator), torch.randn(1, 4, generator=generator))
        for length in (5, 5, 7, 5)
    ]
    return Points(
        torch.randn(6, 16, 4, 4, generator=generator),
        torch.rand(6, generator=generator),
        torch.tensor([0, 1, 2, 3, 0, 1]),
        torch.tensor([0, 0, 1, 1, 2, 2]),
        torch.tensor([True, True, False, True, True, True]),
        told,
    )


def test_batches_hold_every_row_once_and_keep_groups_and_lengths_apart() -> None:
    batches = some_points().batches(torch.device("cpu"), torch.float32)
    assert sum(len(batch.sigma) for batch in batches) == 6 + 5  # positive, and negative where guided
    counts: Counter[int] = Counter()
    for batch in batches:
        counts[batch.group] += len(batch.sigma)
        assert len(batch.sigma) == len(batch.latents) == len(batch.context) == len(batch.pooled)
    assert counts == {0: 4, 1: 4, 2: 1, 3: 2}
    assert {batch.context.shape[1] for batch in batches} == {5, 7}


def test_points_come_back_from_a_file_and_only_to_those_who_made_them(tmp_path: Path) -> None:
    points = some_points()
    points.save(tmp_path / "points.safetensors", "mine")
    again = Points.read(tmp_path / "points.safetensors", "mine")
    assert again is not None
    assert again.digest == points.digest
    assert Points.read(tmp_path / "points.safetensors", "another's") is None
    assert Points.read(tmp_path / "nothing.safetensors", "mine") is None
    (tmp_path / "points.safetensors").write_bytes(b"cut off")
    assert Points.read(tmp_path / "points.safetensors", "mine") is None


def test_built_in_prompts_are_many_different_and_apart_from_those_of_the_gate() -> None:
    for embedded in (False, True):
        prompts, judged = calibration_prompts(128, embedded=embedded), gate_prompts(GATE, embedded=embedded)
        assert len(set(prompts)) == 128
        assert len(set(judged)) == GATE
        assert not set(prompts) & set(judged)
    assert calibration_prompts(130, embedded=False)[128:] == calibration_prompts(2, embedded=False)


def test_the_embedded_model_knows_every_word_that_it_is_calibrated_on() -> None:
    components = octavo.load(device="cpu")
    for prompt in calibration_prompts(300, embedded=True):
        assert components.remarks(prompt) == []


def test_prompts_are_the_lines_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red star\n\n  a blue one \n", "utf-8")
    assert read_prompts(tmp_path / "prompts.txt") == ["a red star", "a blue one"]
    (tmp_path / "prompts.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RequestError, match="Cannot read the prompts"):
        read_prompts(tmp_path / "prompts.txt")
