"""Nodes that make pictures and change their size, frame and number."""

import pytest
import torch
from torch import Tensor

from octavo.errors import RequestError
from octavo.graph.nodes import image as nodes
from octavo.graph.spec import NodeSpec
from tests.graph.nodes.bare import bare, gradient


def run(spec: NodeSpec, **inputs: object) -> Tensor:
    return spec.run(bare(), **inputs)[0]


def test_an_empty_image_has_one_colour() -> None:
    out = run(nodes.empty_image, width=5, height=3, batch_size=2, color=0xFF8000)
    assert torch.equal(out, torch.tensor([255.0, 128.0, 0.0]).div(255).expand(2, 3, 5, 3))


@pytest.mark.parametrize(
    ("asked", "given"), [((20, 10), (20, 10)), ((0, 80), (112, 80)), ((28, 0), (28, 20)), ((0, 0), (56, 40))]
)
def test_scaling_takes_a_missing_side_from_the_other(asked: tuple[int, int], given: tuple[int, int]) -> None:
    out = run(
        nodes.image_scale,
        image=gradient(40, 56),
        upscale_method="area",
        width=asked[0],
        height=asked[1],
        crop="disabled",
    )
    assert (out.shape[2], out.shape[1]) == given


def test_scaling_by_a_factor_rounds_the_sides() -> None:
    out = run(nodes.image_scale_by, image=gradient(5, 7), upscale_method="bilinear", scale_by=1.5)
    assert out.shape == (1, 8, 10, 3)
    assert run(nodes.image_scale_by, image=gradient(5, 7), upscale_method="area", scale_by=0.01).shape == (1, 1, 1, 3)


@pytest.mark.parametrize(("megapixels", "steps"), [(0.01, 1), (0.05, 8), (0.02, 16)])
def test_scaling_to_a_number_of_pixels_keeps_the_shape(megapixels: float, steps: int) -> None:
    out = run(
        nodes.image_scale_to_total_pixels,
        image=gradient(40, 60),
        upscale_method="lanczos",
        megapixels=megapixels,
        resolution_steps=steps,
    )
    height, width = out.shape[1:3]
    assert height % steps == width % steps == 0
    # Rounded to the nearest step, each side is off by at most half of one.
    assert abs(width - (megapixels * 2**20 * 1.5) ** 0.5) <= steps / 2
    assert abs(height - (megapixels * 2**20 / 1.5) ** 0.5) <= steps / 2


def test_scaling_beyond_reason_is_refused_before_memory_is_taken() -> None:
    with pytest.raises(RequestError, match="are the most"):
        nodes.image_scale_by.run(
            bare(max_pixels=1024), image=gradient(300, 300), upscale_method="lanczos", scale_by=8.0
        )


def test_cropping_takes_what_lies_inside_of_the_picture() -> None:
    x = gradient(10, 12)
    assert torch.equal(run(nodes.image_crop, image=x, width=4, height=3, x=5, y=6), x[:, 6:9, 5:9])
    assert torch.equal(run(nodes.image_crop, image=x, width=99, height=99, x=50, y=2), x[:, 2:, 11:])


def test_padding_is_grey_masked_and_fades_into_the_picture() -> None:
    x = gradient(40, 56, 2)
    image, mask = nodes.image_pad_for_outpaint.run(bare(), image=x, left=8, top=0, right=16, bottom=24, feathering=10)
    assert image.shape == (2, 64, 80, 3)
    assert torch.equal(image[:, :40, 8:64], x)
    assert (image[:, 40:] == 0.5).all()
    assert mask.shape == (1, 64, 80)
    assert (mask[0, 40:] == 1).all()
    assert (mask[0, :40, :8] == 1).all()
    # ((10 - d) / 10)² at d pixels from the nearest margin; there is none at the top.
    torch.testing.assert_close(mask[0, 0, 8:20], ((10 - torch.arange(12.0)).clamp(0) / 10) ** 2)
    torch.testing.assert_close(mask[0, 10:40, 36], ((10 - torch.arange(30.0, 0, -1)).clamp(0) / 10) ** 2)


@pytest.mark.parametrize("feathering", [0, 20, 400])
def test_padding_does_not_fade_where_fades_would_meet(feathering: int) -> None:
    _, mask = nodes.image_pad_for_outpaint.run(
        bare(), image=gradient(40, 56), left=8, top=8, right=8, bottom=8, feathering=feathering
    )
    assert (mask[0, 8:-8, 8:-8] == 0).all()


def test_the_negative_of_a_negative_is_the_picture() -> None:
    x = gradient(4, 4)
    negative = run(nodes.image_invert, image=x)
    assert torch.equal(negative, 1 - x)
    torch.testing.assert_close(run(nodes.image_invert, image=negative), x)


def test_a_batch_has_the_size_of_its_first_picture() -> None:
    white = torch.ones(2, 30, 10, 3)
    out = run(nodes.image_batch, image1=gradient(4, 8), image2=white)
    assert torch.equal(out, torch.cat([gradient(4, 8), torch.ones(2, 4, 8, 3)]))
