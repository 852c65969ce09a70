"""Teacher-forced errors are those of the weights: none for the same model, exactly the change for a known one."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from octavo import Components, GenerateRequest, load
from octavo.evaluate.velocity import STEPS_WITH_BLOCKS, VelocityErrors, record, replay, steps_with_blocks

REQUESTS = [
    GenerateRequest(prompt="a red star on blue", seed=1, steps=3),
    GenerateRequest(prompt="a small green moon at the top left on white", seed=2, steps=3),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("velocity")
    record(load("octavo-demo"), REQUESTS, folder)
    return folder


def changed(how: str, factor: float) -> Components:
    components = load("octavo-demo")
    mmdit = components.mmdit()
    with torch.no_grad():
        if how == "final":
            mmdit.final_layer.linear.weight *= factor
            assert mmdit.final_layer.linear.bias is not None
            mmdit.final_layer.linear.bias *= factor
        else:
            mmdit.joint_blocks[1].x_block.mlp.fc2.weight *= factor
    return components


def test_the_reference_itself_makes_no_error(folder: Path) -> None:
    errors = replay(load("octavo-demo"), REQUESTS, folder)
    assert errors.by_step == (0, 0, 0)
    assert set(errors.image_by_block + errors.context_by_block) == {0}
    assert errors.whole == 0


def test_an_output_that_is_a_percent_too_large_is_wrong_by_a_percent_at_every_step(folder: Path) -> None:
    """The last layer is linear, so its factor is the velocity's; no block lies behind it."""
    errors = replay(changed("final", 1.01), REQUESTS, folder)
    assert errors.by_step == pytest.approx((0.01,) * 3, rel=1e-3)
    assert errors.whole == pytest.approx(0.01, rel=1e-3)
    assert max(errors.image_by_block) == 0


def test_a_wrong_block_shows_from_there_on_and_not_before(folder: Path) -> None:
    errors = replay(changed("block", 1.1), REQUESTS, folder)
    assert errors.image_by_block[0] == 0
    assert min(errors.image_by_block[1:]) > 0
    assert errors.context_by_block == (0, 0)  # the image's own MLP meets the text only in the next attention
    assert min(errors.by_step) > 0


def test_levels_fall_and_are_those_of_the_sampler(folder: Path) -> None:
    sigmas = replay(load("octavo-demo"), REQUESTS, folder).sigmas
    assert sigmas[0] == 1
    assert list(sigmas) == sorted(sigmas, reverse=True)


def test_errors_survive_a_file() -> None:
    errors = VelocityErrors((1.0,), (0.1,), (0.2, 0.3), (0.4,), 0.1)
    assert VelocityErrors.from_json(errors.to_json()) == errors


@pytest.mark.parametrize("steps", [1, 2, 8, 9, 28, 50])
def test_blocks_are_kept_at_steps_spread_over_the_whole_run(steps: int) -> None:
    kept = steps_with_blocks(steps)
    assert len(set(kept)) == len(kept) == min(steps, STEPS_WITH_BLOCKS)
    assert (kept[0], kept[-1]) == (0, steps - 1)
    assert max((b - a for a, b in pairwise(kept)), default=0) <= -(-steps // 7)
