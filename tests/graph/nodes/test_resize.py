"""Scaling: laws that every method obeys, and Pillow's and the sphere's word for the two that torch lacks."""

import math

import pytest
import torch
from PIL import Image
from torch import Tensor

from octavo.pipeline.resize import IMAGE_METHODS, LATENT_METHODS, lanczos, resize
from tests.graph.nodes.bare import gradient

METHODS = sorted({*IMAGE_METHODS, *LATENT_METHODS})
SIZES = [(7, 5), (24, 31), (16, 9), (1, 1)]


def picture(batch: int = 2, channels: int = 3) -> Tensor:
    return torch.rand(batch, channels, 9, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", SIZES)
def test_a_constant_stays_as_it_is(method: str, size: tuple[int, int]) -> None:
    x = torch.tensor([0.2, 0.7, 0.9]).view(1, 3, 1, 1).expand(2, 3, 9, 16)
    out = resize(x, *size, method)
    assert out.shape == (2, 3, size[1], size[0])
    torch.testing.assert_close(out, x[:, :, :1, :1].expand_as(out), atol=1e-6, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_size_changes_nothing(method: str) -> None:
    x = picture()
    assert torch.equal(resize(x, 16, 9, method), x)
    assert torch.equal(resize(x, 16, 9, method, crop="center"), x)


@pytest.mark.parametrize("method", METHODS)
def test_mirrored_first_or_last_is_the_same(method: str) -> None:
    x = picture()
    # At 32 from 16 no pixel lies just between two, where the nearest one would be a matter of taste.
    torch.testing.assert_close(resize(x.flip(3), 32, 13, method).flip(3), resize(x, 32, 13, method))


@pytest.mark.parametrize("method", METHODS)
def test_rows_of_a_batch_do_not_meet(method: str) -> None:
    x = picture()
    assert torch.equal(resize(x, 23, 5, method)[1:], resize(x[1:], 23, 5, method))


@pytest.mark.parametrize("size", [(31, 20), (7, 20), (7, 4), (40, 4)])
def test_lanczos_is_pillows_within_two_levels(size: tuple[int, int]) -> None:
    """Pillow 13 in 8 bits: it rounds to a level, and clips, after either direction."""
    levels = (picture(1) * 255).round()
    image = Image.fromarray(levels[0].movedim(0, -1).byte().numpy()).resize(size, Image.Resampling.LANCZOS)
    theirs = torch.tensor(list(image.tobytes())).view(size[1], size[0], 3).movedim(-1, 0)
    assert (lanczos(levels / 255, *size)[0] * 255 - theirs).abs().max() <= 1.5


def test_lanczos_never_leaves_the_range_of_a_picture() -> None:
    step = torch.zeros(1, 1, 8, 8)
    step[..., 4:] = 1
    out = lanczos(step, 33, 33)
    assert out.min() == 0
    assert out.max() == 1


def test_bislerp_turns_at_an_even_pace_and_keeps_the_length() -> None:
    """Between unit vectors a right angle apart, halfway is at 45 degrees and still of length 1."""
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).view(1, 2, 1, 2)
    out = resize(x, 8, 1, "bislerp")[0, :, 0]
    # Centres of eight pixels over two: the places between them, and the ends beyond.
    turned = torch.tensor([0, 0, 1 / 8, 3 / 8, 5 / 8, 7 / 8, 1, 1]) * (math.pi / 2)
    torch.testing.assert_close(out, torch.stack([turned.cos(), turned.sin()]), atol=1e-6, rtol=0)


def test_bislerp_blends_lengths_linearly() -> None:
    x = torch.tensor([[1.0, 0.0], [0.0, 3.0]]).view(1, 2, 1, 2)
    lengths = resize(x, 8, 1, "bislerp").norm(dim=1)[0, 0]
    torch.testing.assert_close(lengths, torch.tensor([1, 1, 1.25, 1.75, 2.25, 2.75, 3, 3]))


def test_bislerp_of_opposites_and_of_nothing_is_a_number() -> None:
    x = torch.tensor([[1.0, -1.0, 0.0], [2.0, -2.0, 0.0]]).view(1, 2, 1, 3)
    out = resize(x, 12, 6, "bislerp")
    assert out.isfinite().all()
    assert out.abs().max() <= 2


@pytest.mark.parametrize(
    ("size", "kept"), [((8, 4), (slice(0, 8), slice(0, 16))), ((4, 4), (slice(0, 8), slice(4, 12)))]
)
def test_cropped_to_the_middle_before_scaling(size: tuple[int, int], kept: tuple[slice, slice]) -> None:
    x = picture()[:, :, :8]
    assert torch.equal(resize(x, *size, "area", crop="center"), resize(x[:, :, *kept], *size, "area"))


def test_a_tall_target_crops_the_sides_and_a_flat_one_top_and_bottom() -> None:
    x = gradient(12, 12).movedim(-1, 1)
    assert torch.equal(resize(x, 6, 12, "nearest-exact", crop="center"), x[:, :, :, 3:9])
    assert torch.equal(resize(x, 12, 6, "nearest-exact", crop="center"), x[:, :, 3:9])


def test_something_is_left_however_unlike_the_shapes_are() -> None:
    assert resize(torch.ones(1, 1, 1, 500), 1, 500, "bilinear", crop="center").min() == 1
