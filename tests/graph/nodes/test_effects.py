"""Blends, blurs and edges, by what they must do to pictures of which it is known."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.errors import RequestError
from octavo.graph.nodes.image_effects import MODES, blend, blur, canny_node, image_blend, sharpen
from octavo.pipeline.edges import canny
from tests.graph.nodes.bare import bare, gradient

BLACK, GREY, WHITE = (torch.full((1, 6, 8, 3), value) for value in (0.0, 0.5, 1.0))


def test_no_blend_gives_the_first_picture_and_a_whole_normal_one_the_second() -> None:
    a, b = gradient(6, 8), 1 - gradient(6, 8)
    for mode in MODES:
        torch.testing.assert_close(blend(a, b, 0.0, mode), a)
    torch.testing.assert_close(blend(a, b, 1.0, "normal"), b)
    torch.testing.assert_close(blend(a, b, 0.25, "normal"), 0.75 * a + 0.25 * b)


@pytest.mark.parametrize(
    ("mode", "neutral"), [("multiply", WHITE), ("screen", BLACK), ("soft_light", GREY), ("difference", BLACK)]
)
def test_each_mode_has_a_colour_that_changes_nothing(mode: str, neutral: Tensor) -> None:
    a = gradient(6, 8)
    torch.testing.assert_close(blend(a, neutral, 1.0, mode), a)


@pytest.mark.parametrize(("mode", "over", "becomes"), [("multiply", BLACK, BLACK), ("screen", WHITE, WHITE)])
def test_each_mode_has_a_colour_that_covers_all(mode: str, over: Tensor, becomes: Tensor) -> None:
    torch.testing.assert_close(blend(gradient(6, 8), over, 1.0, mode), becomes)


def test_overlay_is_multiply_below_the_middle_and_screen_above() -> None:
    dark, light, b = torch.full_like(GREY, 0.25), torch.full_like(GREY, 0.75), gradient(6, 8)
    torch.testing.assert_close(blend(dark, b, 1.0, "overlay"), 2 * dark * b)
    torch.testing.assert_close(blend(light, b, 1.0, "overlay"), 1 - 2 * (1 - light) * (1 - b))


def test_soft_light_has_no_step_where_its_pieces_meet() -> None:
    a = torch.tensor([0.25 - 1e-6, 0.25 + 1e-6]).view(1, 1, 2, 1)
    below, above = blend(a, torch.full_like(a, 0.9), 1.0, "soft_light").flatten()
    assert abs(above - below) < 1e-5


def test_the_second_picture_is_fitted_to_the_first() -> None:
    assert blend(gradient(6, 8, 2), torch.full((1, 30, 20, 3), 0.5), 1.0, "normal").shape == (2, 6, 8, 3)
    with pytest.raises(RequestError, match="2 and 3 pictures"):
        image_blend.run(
            bare(), image1=gradient(6, 8, 2), image2=gradient(6, 8, 3), blend_factor=0.5, blend_mode="screen"
        )


@pytest.mark.parametrize(("radius", "sigma"), [(1, 1.0), (5, 0.3), (9, 10.0)])
def test_a_blurred_point_is_the_bell_that_comfyui_draws(radius: int, sigma: float) -> None:
    """exp(-r²/2σ²) with the distance r counted in radii, over a square, summing to 1."""
    point = torch.zeros(1, 1, 41, 41)
    point[..., 20, 20] = 1
    places = torch.linspace(-1, 1, 2 * radius + 1)
    bell = (-(places[:, None] ** 2 + places**2) / (2 * sigma**2)).exp()
    wanted = F.pad(bell / bell.sum(), (20 - radius,) * 4)
    torch.testing.assert_close(blur(point, radius, sigma)[0, 0], wanted)


@pytest.mark.parametrize("radius", [1, 4, 31])
def test_blur_keeps_constants_and_symmetric_ramps(radius: int) -> None:
    ramp = torch.arange(80.0).expand(1, 2, 70, 80) / 80
    inner = (slice(None), slice(None), slice(radius, -radius), slice(radius, -radius))
    torch.testing.assert_close(blur(ramp, radius, 1.0)[inner], ramp[inner])
    torch.testing.assert_close(blur(torch.full_like(ramp, 0.3), radius, 1.0), torch.full_like(ramp, 0.3))


def test_sharpening_adds_ten_times_alpha_of_what_blur_takes() -> None:
    x = gradient(12, 9).movedim(-1, 1)
    torch.testing.assert_close(sharpen(x, 2, 0.5, 0.0), x)
    wanted = (x + 0.5 * (x - blur(x, 2, 0.5))).clamp(0, 1)
    torch.testing.assert_close(sharpen(x, 2, 0.5, 0.05), wanted)


def test_a_radius_wider_than_the_picture_is_refused() -> None:
    with pytest.raises(RequestError, match="at least 9 pixels"):
        blur(torch.zeros(1, 3, 8, 40), 8, 1.0)


# Edges


def disc(contrast: float = 1.0) -> Tensor:
    """A bright disc of radius 14 around (24.3, 20.1) on black, its rim one pixel wide.

    Canny keeps only what is larger than both neighbours, so a step just between two pixels, alike on both, is lost.
    """
    rows, columns = torch.arange(48.0)[:, None] - 24.3, torch.arange(40.0) - 20.1
    return (14.5 - rows.hypot(columns)).clamp(0, 1).expand(1, 3, 48, 40) * contrast


def test_the_edge_of_a_disc_is_a_thin_closed_line_along_it() -> None:
    edges = canny(disc(), 0.4, 0.8)[0, 0]
    rows, columns = edges.nonzero(as_tuple=True)
    distance = (rows - 24.3).hypot(columns - 20.1)
    assert ((distance - 14).abs() < 1.8).all()
    # A circle drawn with diagonal steps has 4·√2·r pixels, one with corners as well at most 8·r.
    assert 4 * math.sqrt(2) * 13 <= len(rows) <= 8 * 15
    angles = torch.atan2(rows - 24.3, columns - 20.1).sort().values
    assert angles.diff().max() < 0.15  # no gap of more than two pixels


def test_edges_are_zeros_and_ones_and_turn_with_the_picture() -> None:
    x = disc()
    edges = canny(x, 0.2, 0.6)
    assert set(edges.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(canny(x.transpose(2, 3), 0.2, 0.6), edges.transpose(2, 3))


def test_a_weak_edge_stays_only_where_it_touches_a_strong_one() -> None:
    """Along one line of a picture the step in brightness, and so the gradient, grows from left to right."""
    x = torch.zeros(1, 1, 21, 60)
    x[..., 11:, :] = torch.linspace(0.2, 1.0, 60)
    x[..., 10, :] = x[..., 11, :] / 2
    left, right = (..., slice(8, 12), slice(0, 15)), (..., slice(8, 12), slice(45, 60))
    joined = canny(x, 0.4, 1.8)
    assert joined[left].sum() >= 14
    assert joined[right].sum() >= 14
    x[..., 20:30] = 0.0  # a gap, beyond which the weak part is alone
    parted = canny(x, 0.4, 1.8)
    assert parted[left].sum() == 0
    assert parted[right].sum() >= 14
    assert canny(x, 0.4, 0.5)[left].sum() >= 14


def test_nothing_has_no_edges_and_higher_thresholds_give_fewer() -> None:
    assert canny(torch.full((1, 3, 9, 9), 0.7), 0.01, 0.02).sum() == 0
    noise = torch.rand(1, 3, 40, 40, generator=torch.Generator().manual_seed(1))
    counts = [int(canny(noise, high / 2, high).sum()) for high in (0.1, 0.3, 0.6)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[2] > 0


def test_the_node_gives_a_white_line_on_black_and_refuses_thresholds_the_wrong_way_round() -> None:
    image = torch.cat([disc(), torch.zeros(1, 3, 48, 40)]).movedim(1, -1)
    (edges,) = canny_node.run(bare(), image=image, low_threshold=0.4, high_threshold=0.8)
    assert torch.equal(edges[:1], canny(disc(), 0.4, 0.8).movedim(1, -1).expand(-1, -1, -1, 3))
    assert edges[1].sum() == 0
    with pytest.raises(RequestError, match="exchange them"):
        canny_node.run(bare(), image=image, low_threshold=0.9, high_threshold=0.8)
