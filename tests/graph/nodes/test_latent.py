"""Nodes that make and remake latents."""

import pytest
import torch
from torch import Tensor

from octavo.errors import RequestError
from octavo.graph.nodes import latent as nodes
from octavo.graph.nodes.types import Latent
from octavo.graph.spec import NodeSpec
from tests.graph.nodes.bare import bare


def numbers(batch: int = 1, height: int = 12, width: int = 16, channels: int = 16) -> Tensor:
    """Latents whose numbers differ everywhere."""
    return torch.arange(1.0, batch * channels * height * width + 1).view(batch, channels, height, width)


def run(spec: NodeSpec, **inputs: object) -> Latent:
    """The one output of a node; the numbers it was given must stay as they were."""
    given = [value["samples"] for value in inputs.values() if isinstance(value, dict)]
    before = [samples.clone() for samples in given]
    (out,) = spec.run(bare(), **inputs)
    assert all(torch.equal(now, then) for now, then in zip(given, before, strict=True))
    return out


# New ones


@pytest.mark.parametrize(("spec", "channels"), [(nodes.empty_latent_image, 4), (nodes.empty_sd3_latent_image, 16)])
def test_empty_latents_are_zeros_an_eighth_as_large(spec: NodeSpec, channels: int) -> None:
    out = run(spec, width=72, height=40, batch_size=3)
    assert torch.equal(out["samples"], torch.zeros(3, channels, 5, 9))


@pytest.mark.parametrize(("width", "height", "batch"), [(16384, 16384, 4096), (2048, 2048, 1), (64, 64, 4096)])
def test_more_than_anyone_can_mean_is_refused_before_memory_is_taken(width: int, height: int, batch: int) -> None:
    context = bare(max_pixels=1 << 16)
    with pytest.raises(RequestError, match=r"Ask for (a smaller one|fewer)"):
        nodes.empty_sd3_latent_image.run(context, width=width, height=height, batch_size=batch)


# Size


@pytest.mark.parametrize(
    ("asked", "given"),
    [((256, 128), (256, 128)), ((0, 192), (256, 192)), ((256, 0), (256, 192)), ((8, 0), (64, 64)), ((0, 0), (128, 96))],
)
def test_upscaling_takes_a_missing_side_from_the_other_and_no_less_than_64(
    asked: tuple[int, int], given: tuple[int, int]
) -> None:
    samples: Latent = {"samples": numbers()}
    inputs = {"upscale_method": "bislerp", "width": asked[0], "height": asked[1], "crop": "disabled"}
    out = run(nodes.latent_upscale, samples=samples, **inputs)["samples"]
    assert (out.shape[3] * 8, out.shape[2] * 8) == given


def test_upscaling_by_a_factor_keeps_mask_and_places() -> None:
    samples: Latent = {"samples": numbers(2), "noise_mask": torch.ones(1, 1, 9, 9), "batch_index": [4, 2]}
    out = run(nodes.latent_upscale_by, samples=samples, upscale_method="nearest-exact", scale_by=2.0)
    assert torch.equal(out["samples"], numbers(2).repeat_interleave(2, 2).repeat_interleave(2, 3))
    assert out["noise_mask"] is samples["noise_mask"]
    assert out["batch_index"] == [4, 2]


def test_upscaling_beyond_what_may_be_drawn_is_refused() -> None:
    with pytest.raises(RequestError, match="may be drawn"):
        nodes.latent_upscale_by.run(
            bare(max_pixels=20_000), samples={"samples": numbers()}, upscale_method="area", scale_by=8.0
        )


def test_cropping_takes_the_rectangle_and_what_lies_inside_of_it() -> None:
    x = numbers(1, 20, 20)
    place = {"width": 64, "height": 80, "x": 24, "y": 40}
    assert torch.equal(run(nodes.latent_crop, samples={"samples": x}, **place)["samples"], x[:, :, 5:15, 3:11])
    beyond = {"width": 512, "height": 64, "x": 16384, "y": 0}
    assert torch.equal(run(nodes.latent_crop, samples={"samples": x}, **beyond)["samples"], x[:, :, :8, 12:])


def test_flips_and_quarter_turns() -> None:
    x = numbers()
    samples: Latent = {"samples": x}
    assert torch.equal(run(nodes.latent_flip, samples=samples, flip_method="x-axis: vertically")["samples"], x.flip(2))
    assert torch.equal(
        run(nodes.latent_flip, samples=samples, flip_method="y-axis: horizontally")["samples"], x.flip(3)
    )
    turned = run(nodes.latent_rotate, samples=samples, rotation="90 degrees")["samples"]
    # Clockwise: what was at the top left comes to the top right.
    assert torch.equal(turned[0, :, 0, -1], x[0, :, 0, 0])
    again = run(nodes.latent_rotate, samples={"samples": turned}, rotation="270 degrees")
    assert torch.equal(again["samples"], x)
    assert torch.equal(run(nodes.latent_rotate, samples=samples, rotation="none")["samples"], x)


# Two into one


def composite(under: Tensor, over: Tensor, x: int, y: int, feather: int) -> Tensor:
    inputs = {"samples_to": {"samples": under}, "samples_from": {"samples": over}}
    return run(nodes.latent_composite, **inputs, x=x, y=y, feather=feather)["samples"]


def test_a_composite_without_feather_replaces_the_rectangle() -> None:
    under, over = numbers(2), -numbers(1, 6, 6)
    out = composite(under, over, 80, 24, 0)
    wanted = under.clone()
    wanted[:, :, 3:9, 10:16] = over
    assert torch.equal(out, wanted)
    cut = composite(under, over, 96, 64, 0)  # partly outside
    assert torch.equal(cut[:, :, 8:, 12:], over[:, :, :4, :4].expand(2, -1, -1, -1))


def test_feather_fades_linearly_and_only_sides_that_lie_inside() -> None:
    out = composite(torch.zeros(1, 1, 10, 10), torch.ones(1, 1, 10, 8), 16, 0, 32)[0, 0]
    # The left side lies inside; top, bottom and right are those of the whole.
    assert torch.equal(out[:, :2], torch.zeros(10, 2))
    torch.testing.assert_close(out[:, 2:], torch.tensor([0.25, 0.5, 0.75, 1, 1, 1, 1, 1]).expand(10, 8))


def test_feathered_sides_multiply_in_a_corner() -> None:
    out = composite(torch.zeros(1, 1, 12, 12), torch.ones(1, 1, 6, 6), 24, 24, 16)[0, 0, 3:9, 3:9]
    ramp = torch.tensor([0.5, 1, 1, 1, 1, 0.5])
    torch.testing.assert_close(out, ramp[:, None] * ramp)


def test_a_composite_that_cannot_be_is_refused() -> None:
    with pytest.raises(RequestError, match="lies outside"):
        composite(numbers(), numbers(), 128, 0, 0)
    with pytest.raises(RequestError, match="3 latents cannot be laid over 2"):
        composite(numbers(2), numbers(3), 0, 0, 0)
    with pytest.raises(RequestError, match="4 and 16 channels"):
        composite(numbers(), numbers(channels=4), 0, 0, 0)


def test_empty_latents_of_four_channels_go_with_any_others() -> None:
    out = composite(numbers(), torch.zeros(1, 4, 4, 4), 0, 0, 0)
    assert out[:, :, :4, :4].abs().max() == 0
    assert torch.equal(out[:, :, 4:], numbers()[:, :, 4:])


def test_a_blend_is_the_factor_of_the_first_and_the_rest_of_the_second() -> None:
    a, b = numbers(), -2 * numbers()
    inputs = {"samples1": {"samples": a}, "samples2": {"samples": b}}
    torch.testing.assert_close(run(nodes.latent_blend, **inputs, blend_factor=0.25)["samples"], 0.25 * a + 0.75 * b)
    other = {"samples1": {"samples": a}, "samples2": {"samples": torch.full((1, 16, 3, 3), 5.0)}}
    torch.testing.assert_close(run(nodes.latent_blend, **other, blend_factor=0.0)["samples"], torch.full_like(a, 5.0))


# Batches


def test_a_batch_of_two_goes_on_counting_as_each_did() -> None:
    first: Latent = {"samples": numbers(2), "batch_index": [5, 6]}
    second: Latent = {"samples": torch.full((3, 16, 24, 32), 7.0)}
    out = run(nodes.latent_batch, samples1=first, samples2=second)
    assert torch.equal(out["samples"], torch.cat([numbers(2), torch.full((3, 16, 12, 16), 7.0)]))
    assert out["batch_index"] == [5, 6, 0, 1, 2]


@pytest.mark.parametrize(("first", "length", "kept"), [(0, 1, [0]), (1, 2, [1, 2]), (2, 64, [2, 3]), (63, 1, [3])])
def test_some_of_a_batch_keep_their_places_and_their_masks(first: int, length: int, kept: list[int]) -> None:
    mask = torch.arange(2.0).view(2, 1, 1, 1).expand(2, 1, 3, 3)  # fewer than latents: they repeat
    samples: Latent = {"samples": numbers(4), "noise_mask": mask}
    out = run(nodes.latent_from_batch, samples=samples, batch_index=first, length=length)
    assert torch.equal(out["samples"], numbers(4)[kept])
    assert out["batch_index"] == kept
    assert out["noise_mask"][:, 0, 0, 0].tolist() == [place % 2 for place in kept]
    again = run(nodes.latent_from_batch, samples=out, batch_index=0, length=1)
    assert again["batch_index"] == kept[:1]


def test_repeated_latents_are_other_pictures_of_the_seed() -> None:
    samples: Latent = {"samples": numbers(2), "batch_index": [3, 1], "noise_mask": torch.ones(1, 1, 4, 4)}
    out = run(nodes.repeat_latent_batch, samples=samples, amount=3)
    assert torch.equal(out["samples"], torch.cat([numbers(2)] * 3))
    assert out["batch_index"] == [3, 1, 6, 4, 9, 7]
    assert out["noise_mask"].shape[0] == 1
    assert "batch_index" not in run(nodes.repeat_latent_batch, samples={"samples": numbers()}, amount=2)


def test_repeating_more_than_anyone_can_mean_is_refused() -> None:
    with pytest.raises(RequestError, match="pictures of"):
        nodes.repeat_latent_batch.run(bare(max_pixels=20_000), samples={"samples": numbers(2)}, amount=64)
