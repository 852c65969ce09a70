"""Many prompts a side: ComfyUI's runs, and the laws that their mixture obeys."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from octavo.errors import RequestError
from octavo.pipeline.conditions import Arranged, Box, Condition, arrange, mix
from octavo.pipeline.denoise import Question, Track, denoise
from octavo.pipeline.encode import Conditioning
from tests.pipeline.recorded import cfg, latents, levels, plain, recorded, sides, tiny_mmdit, told


def condition(name: str, **settings: object) -> Condition:
    return Condition(conditioning=told(name), **settings)  # type: ignore[arg-type]


def zeroed() -> Track:
    pos = told("pos")
    nothing = Conditioning(torch.zeros_like(pos.context), torch.zeros_like(pos.pooled))
    return replace(plain(), negative=[Condition(conditioning=nothing)], tables={}, arranged={})


def joined() -> Track:
    pos, pos2 = told("pos"), told("pos2")
    return sides(Condition(conditioning=Conditioning(torch.cat([pos.context, pos2.context], dim=1), pos.pooled)))


def averaged() -> Track:
    pos, pos2 = told("pos"), told("pos2")
    context = torch.zeros_like(pos.context)
    context[:, : pos2.context.shape[1]] = pos2.context
    both = (0.7 * a + 0.3 * b for a, b in ((pos.context, context), (pos.pooled, pos2.pooled)))
    return sides(Condition(conditioning=Conditioning(*both)))


RECORDED: dict[str, tuple[int, Callable[[], Track]]] = {
    "combine": (4, lambda: sides(condition("pos"), condition("pos2"))),
    "concat": (4, joined),
    "average": (4, averaged),
    "cfg_zero_out_negative": (4, zeroed),
    "timestep_range": (6, lambda: sides(condition("pos", end=0.5), condition("pos2", start=0.5))),
    "area": (4, lambda: sides(condition("pos"), condition("pos2", area=(4, 4, 1, 2)))),
    "cond_mask": (
        4,
        lambda: sides(condition("pos"), condition("pos2", mask=recorded()["in/mask_pixels"], mask_strength=0.8)),
    ),
}


@pytest.mark.parametrize("case", RECORDED)
def test_latents_equal_comfyui(case: str) -> None:
    steps, track = RECORDED[case]
    torch.testing.assert_close(latents(track(), levels(steps)), recorded()[f"out/{case}"], atol=1e-4, rtol=0)


# What follows needs no model: predictions are numbers that say who made them.

SIZE = (24, 40)
LIKE = torch.zeros(2, 16, *SIZE)


def made_up(name: float = 0.0, **settings: object) -> Condition:
    return Condition(conditioning=Conditioning(torch.full((1, 3, 4), name), torch.full((1, 2), name)), **settings)  # type: ignore[arg-type]


def laid(*positive: Condition, negative: tuple[Condition, ...] = (), like: Tensor = LIKE) -> Arranged:
    return arrange(positive, negative, (like.shape[2], like.shape[3]), 3.0, like)


def mixed(*positive: Condition, like: Tensor = LIKE) -> Tensor:
    """Each condition predicts its own name everywhere."""
    parts = []
    for placed in laid(*positive, like=like).positive:
        parts.append((placed, torch.full_like(placed.crop(like), float(placed.conditioning.pooled[0, 0]))))
    return mix(parts, like)


def test_one_plain_prompt_is_its_prediction_bit_for_bit() -> None:
    prediction = torch.randn(LIKE.shape, generator=torch.Generator().manual_seed(0))
    for strength in (1.0, 0.3, 7.0):
        (placed,) = laid(made_up(strength=strength)).positive
        assert mix([(placed, prediction)], LIKE) is prediction


def test_prompts_everywhere_are_averaged_by_their_strength() -> None:
    torch.testing.assert_close(
        mixed(made_up(1, strength=3.0), made_up(5, strength=1.0)), torch.full_like(LIKE, (3 * 1 + 1 * 5) / 4)
    )


def test_where_nothing_holds_the_estimate_is_zero_and_never_nan() -> None:
    assert not mixed().any()
    assert not mixed(made_up(3, strength=0.0)).any()
    half = torch.zeros(1, *SIZE)
    half[:, :, 20:] = 1
    got = mixed(made_up(3, mask=half))
    assert not got[..., :20].any()
    assert (got[..., 20:] == 3).all()
    inside = mixed(made_up(3, area=(8, 8, 4, 4)))
    assert inside.isfinite().all()
    assert (inside[..., 4:12, 4:12] == 3).all()
    assert inside.sum() == pytest.approx(2 * 16 * 8 * 8 * 3)


def test_an_area_fades_towards_the_edges_that_are_not_the_pictures() -> None:
    """Beside a prompt of 0 everywhere, an area's prompt of 1 shows its weight w as w / (1 + w)."""
    got = mixed(made_up(0), made_up(1, area=(24, 20, 0, 0)))
    weight = got[0, 0] / (1 - got[0, 0])
    across = [1.0] * 15 + [1.0, 0.8, 0.6, 0.4, 0.2] + [0.0] * 20  # a quarter of 20 columns, on the right only
    torch.testing.assert_close(weight, torch.tensor(across).expand(24, 40), atol=1e-6, rtol=1e-5)
    large = laid(made_up(area=(24, 38, 0, 2))).positive[0].weight
    assert isinstance(large, Tensor)
    torch.testing.assert_close(large[0, 0, 0, :9], torch.tensor([*(k / 8 for k in range(1, 9)), 1.0]))
    assert (large[..., 9:] == 1).all()


def test_a_mask_weighs_and_does_not_fade() -> None:
    mask = torch.rand(1, 7, 11, generator=torch.Generator().manual_seed(1))
    got = mixed(made_up(0), made_up(1, mask=mask, mask_strength=0.5, strength=2.0, area=(10, 10, 3, 3)))
    resized = torch.nn.functional.interpolate(mask[None], size=SIZE, mode="bilinear")[0, 0]
    weight = torch.zeros(SIZE)
    weight[3:13, 3:13] = resized[3:13, 3:13]
    torch.testing.assert_close(got[1, 5], weight / (1 + weight), atol=1e-6, rtol=1e-5)


def test_every_picture_of_a_batch_has_its_own_mask_as_far_as_there_are_any() -> None:
    masks = torch.stack([torch.ones(SIZE), torch.zeros(SIZE)])
    two = mixed(made_up(1, mask=masks))
    assert two[0].all()
    assert not two[1].any()
    three = mixed(made_up(1, mask=masks), like=torch.zeros(3, 16, *SIZE))
    assert three[0].all()
    assert not three[1].any()
    assert three[2].all()
    assert mixed(made_up(1, mask=masks), like=LIKE[:1]).all()


def test_weights_lie_on_the_latents_device() -> None:
    mask = torch.ones(1, 8, 8)
    like = torch.zeros(1, 16, *SIZE, device="meta")
    for placed in laid(made_up(area=(8, 8, 4, 4)), made_up(mask=mask), like=like).positive:
        assert isinstance(placed.weight, Tensor)
        assert placed.weight.device == like.device


@pytest.mark.parametrize(
    ("area", "box"),
    [
        ((8, 16, 2, 4), Box(8, 16, 2, 4)),
        ((100, 100, 2, 4), Box(22, 36, 2, 4)),  # cut at the picture's edge
        ((0.5, 0.25, 0.0, 0.5), Box(12, 10, 0, 20)),
        ((0.0, 1.0, 0.5, 0.0), Box(1, 40, 12, 0)),
    ],
)
def test_an_area_is_in_latent_pixels_or_in_fractions(area: tuple[int, int, int, int], box: Box) -> None:
    assert laid(made_up(area=area)).positive[0].box == box


@pytest.mark.parametrize(
    ("marked", "box"),
    [
        ((slice(3, 20), slice(5, 30)), Box(17, 25, 3, 5)),
        ((slice(3, 4), slice(5, 6)), Box(8, 8, 3, 5)),
        ((slice(22, 24), slice(38, 40)), Box(2, 2, 22, 38)),
        ((slice(0, 0), slice(0, 0)), Box(8, 8, 0, 0)),
    ],
)
def test_the_area_around_a_mask_is_at_least_eight_a_side(marked: tuple[slice, slice], box: Box) -> None:
    mask = torch.zeros(1, *SIZE)
    mask[0][marked] = 0.5
    (placed,) = laid(made_up(mask=mask, mask_bounds=True)).positive
    assert placed.box == box


def test_a_condition_holds_between_its_levels_both_included() -> None:
    """Half of the timesteps at shift 3 is sigma 3 · 0.5 / (1 + 2 · 0.5) = 0.75."""
    early, late = laid(made_up(end=0.5), made_up(start=0.5)).positive
    held = {sigma: (early.active(sigma), late.active(sigma)) for sigma in (1.0, 0.76, 0.75, 0.74, 0.0)}
    assert held == {
        1.0: (True, False), 0.76: (True, False), 0.75: (True, True), 0.74: (False, True), 0.0: (False, True)
    }  # fmt: skip


def counterparts(positive: tuple[Condition, ...], negative: tuple[Condition, ...]) -> list[tuple[float, Box | None]]:
    """Name and box of what the negative side says."""
    return [
        (float(placed.conditioning.pooled[0, 0]), placed.box) for placed in laid(*positive, negative=negative).negative
    ]


def test_an_area_gets_a_counterpart_of_the_smallest_around_it_else_of_the_first_without_area() -> None:
    small = made_up(1, area=(8, 8, 4, 4), strength=0.5, start=0.25)
    everywhere = (made_up(2), made_up(3))
    added = counterparts((small,), everywhere)
    assert added == [(2, None), (3, None), (2, Box(8, 8, 4, 4))]

    around = (
        made_up(2),
        made_up(4, area=(20, 20, 0, 0)),
        made_up(5, area=(12, 12, 2, 2)),
        made_up(6, area=(8, 8, 5, 4)),
    )
    assert counterparts((small,), around)[4:] == [(5, Box(8, 8, 4, 4))]
    assert counterparts((small,), (made_up(7, area=(8, 8, 4, 4)),)) == [(7, Box(8, 8, 4, 4))]
    assert counterparts((small,), (made_up(7, area=(8, 8, 5, 4)),)) == [(7, Box(8, 8, 5, 4))]

    # It is weighted, and holds, as the condition it answers to.
    both = laid(small, negative=everywhere)
    mine, theirs = both.positive[0], both.negative[2]
    assert torch.equal(torch.as_tensor(mine.weight), torch.as_tensor(theirs.weight))
    assert (mine.first, mine.last) == (theirs.first, theirs.last)
    # And the other way round: the positive side gets one for each area of the negative.
    assert len(laid(*everywhere, negative=(small,)).positive) == 3


@pytest.mark.parametrize(
    "settings",
    [
        {"strength": -1.0}, {"strength": float("nan")}, {"mask_strength": float("inf")}, {"area": (1, 2, 3)},
        {"area": (8, 8, -1, 0)}, {"mask": torch.zeros(4, 4)},
    ],
)  # fmt: skip
def test_conditions_that_make_no_sense_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(RequestError):
        made_up(**settings)


def test_an_area_outside_of_the_picture_is_refused() -> None:
    with pytest.raises(RequestError, match="x 320, y 0 lies outside of the picture, which is 320x192"):
        laid(made_up(area=(8, 8, 0, 40)))


def test_conditions_in_company_get_what_they_get_alone() -> None:
    """Areas, masks, ranges and several prompts in one call with others; only the order of sums may differ."""
    tracks = [
        sides(condition("pos"), condition("pos2", area=(4, 6, 2, 0))),
        sides(condition("pos", mask=recorded()["in/mask_pixels"]), condition("pos2", strength=0.4)),
        sides(condition("pos", end=0.1), condition("pos", start=0.2), scale=2.0),
        plain(),
        replace(plain(), negative=None, guidance=cfg(1.0), tables={}, arranged={}),
    ]
    questions = [
        Question(torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(i)), 0.2 + 0.1 * i, track)
        for i, track in enumerate(tracks)
    ]
    calls: list[tuple[int, ...]] = []
    model = tiny_mmdit()
    handle = model.register_forward_pre_hook(lambda _module, args: calls.append(tuple(args[0].shape)))
    try:
        together = denoise(model, questions)
    finally:
        handle.remove()
    # By size, whatever the length of the text: 20 rows and 13 share a call.
    assert len(calls) == 2
    assert {shape[2:] for shape in calls} == {(8, 8), (4, 6)}
    for question, answer in zip(questions, together, strict=True):
        (alone,) = denoise(model, [question])
        torch.testing.assert_close(answer.denoised, alone.denoised, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(answer.uncond, alone.uncond, atol=2e-5, rtol=1e-5)


def test_what_a_question_costs_is_what_goes_through_the_model() -> None:
    """Image tokens are patches of 2x2: 16 of 8x8 latents, 6 of 4x6."""
    x = torch.zeros(2, 16, 8, 8)
    assert Question(x, 0.5, plain()).tokens == 2 * (20 + 16) * 2
    # The prompt (20 rows of text) and the other (13) in its area; the negative (20), there too.
    with_area = sides(condition("pos"), condition("pos2", area=(4, 6, 2, 0)))
    assert Question(x, 0.5, with_area).tokens == 2 * ((20 + 16) + (13 + 6) + (20 + 16) + (20 + 6))
    assert Question(x, 0.5, plain()).shapes & Question(x, 0.9, with_area).shapes
    assert not Question(x, 0.5, plain()).shapes & Question(x[..., :6], 0.5, plain()).shapes
