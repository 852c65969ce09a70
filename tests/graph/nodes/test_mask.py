"""Nodes for masks."""

import pytest
import torch
from scipy import ndimage
from torch import Tensor

from octavo.errors import RequestError
from octavo.graph.nodes import mask as nodes
from tests.graph.nodes.bare import bare, gradient


def grow(mask: Tensor, expand: int, tapered: bool) -> Tensor:
    (out,) = nodes.grow_mask.run(bare(), mask=mask, expand=expand, tapered_corners=tapered)
    return out


@pytest.mark.parametrize("expand", [-4, -1, 0, 1, 3])
@pytest.mark.parametrize("tapered", [False, True])
def test_growing_is_grey_dilation_and_shrinking_is_erosion(expand: int, tapered: bool) -> None:
    """ComfyUI calls scipy, once for each pixel of growth."""
    mask = torch.rand(2, 9, 13, generator=torch.Generator().manual_seed(0))
    corner = 0 if tapered else 1
    footprint = [[corner, 1, corner], [1, 1, 1], [corner, 1, corner]]
    wanted = mask.numpy()
    for _ in range(abs(expand)):
        step = ndimage.grey_dilation if expand > 0 else ndimage.grey_erosion
        wanted = [step(each, footprint=footprint) for each in wanted]
    assert torch.equal(grow(mask, expand, tapered), torch.stack([torch.as_tensor(each) for each in wanted]))


def test_growing_stops_when_all_is_covered() -> None:
    mask = torch.zeros(1, 20, 20)
    mask[0, 0, 0] = 1
    steps = 0

    def check() -> None:
        nonlocal steps
        steps += 1

    nodes.grow_mask.run(bare(check=check), mask=mask, expand=16384, tapered_corners=False)
    assert steps == 20


def test_one_point_grows_to_a_diamond_or_a_square() -> None:
    point = torch.zeros(1, 9, 9)
    point[0, 4, 4] = 1
    assert grow(point, 2, True).sum() == 13
    assert grow(point, 2, False).sum() == 25


def test_solid_masks_and_their_inverse() -> None:
    (mask,) = nodes.solid_mask.run(bare(), value=0.25, width=7, height=3)
    assert torch.equal(mask, torch.full((1, 3, 7), 0.25))
    (inverse,) = nodes.invert_mask.run(bare(), mask=mask)
    assert torch.equal(inverse, torch.full((1, 3, 7), 0.75))


def test_a_mask_as_a_picture_and_back() -> None:
    mask = gradient(5, 6)[..., 0]
    (image,) = nodes.mask_to_image.run(bare(), mask=mask)
    assert image.shape == (1, 5, 6, 3)
    for channel in ("red", "green", "blue"):
        assert torch.equal(nodes.image_to_mask.run(bare(), image=image, channel=channel)[0], mask)


def test_each_channel_is_its_own_mask_and_a_missing_one_is_refused() -> None:
    image = gradient(5, 6)
    for index, channel in enumerate(("red", "green", "blue")):
        assert torch.equal(nodes.image_to_mask.run(bare(), image=image, channel=channel)[0], image[..., index])
    with pytest.raises(RequestError, match="no alpha channel"):
        nodes.image_to_mask.run(bare(), image=image, channel="alpha")
