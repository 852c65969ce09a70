"""Nodes of the VAE, against ComfyUI's recordings and the laws that tiles and masks obey."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from octavo.errors import NumericsError, OutOfMemoryError, RequestError
from octavo.graph.nodes import vae as nodes
from octavo.graph.nodes.types import Latent
from octavo.models import VAE, VAEConfig
from octavo.pipeline.decode import blend_tiles
from octavo.pipeline.shelf import Vae
from tests.goldens import golden
from tests.graph.nodes.bare import as_vae, bare, gradient, small_vae
from tests.recipes import vae_weights

VIDEO = {"temporal_size": 64, "temporal_overlap": 8}


@pytest.fixture(scope="module")
def recorded() -> dict[str, Tensor]:
    return load_file(golden("comfyui/vae.safetensors"))


@pytest.fixture(scope="module")
def full() -> Vae:
    with torch.device("meta"):
        model = VAE(VAEConfig())
    model.load_state_dict(vae_weights(golden("comfyui/vae.json")), assign=True)
    return as_vae(model)


def numbers(height: int, width: int, batch: int = 1) -> Latent:
    return {"samples": torch.randn(batch, 16, height, width, generator=torch.Generator().manual_seed(0))}


# Recorded


def test_decoding_equals_comfyui(full: Vae, recorded: dict[str, Tensor]) -> None:
    (image,) = nodes.vae_decode.run(bare(), samples={"samples": recorded["decode/in_latent"]}, vae=full)
    torch.testing.assert_close(image, recorded["decode/out_image"], atol=1e-4, rtol=0)


def test_encoding_equals_comfyui(full: Vae, recorded: dict[str, Tensor]) -> None:
    """The picture's 50x83 pixels are cropped to 48x80."""
    (latent,) = nodes.vae_encode.run(bare(), pixels=recorded["encode/in_image"], vae=full)
    torch.testing.assert_close(latent["samples"], recorded["encode/out_latent"], atol=1e-4, rtol=0)


def test_tiled_decoding_equals_comfyui(full: Vae, recorded: dict[str, Tensor]) -> None:
    samples = {"samples": recorded["tiled/in_latent"]}
    (image,) = nodes.vae_decode_tiled.run(bare(), samples=samples, vae=full, tile_size=64, overlap=16, **VIDEO)
    torch.testing.assert_close(image, recorded["tiled/out_image_tile8_overlap2"], atol=1e-4, rtol=0)


# Tiles


def test_tiled_decoding_is_the_mean_of_three_tilings() -> None:
    """Tiles as given, flat and tall: proven to be ComfyUI's way in tests/pipeline/test_decode.py."""
    vae, samples = small_vae(), numbers(20, 14)
    (image,) = nodes.vae_decode_tiled.run(bare(), samples=samples, vae=vae, tile_size=64, overlap=16, **VIDEO)
    passes = [
        blend_tiles(vae.part().decode, samples["samples"], tile=shape, overlap=2, factor=8)
        for shape in ((8, 8), (16, 4), (4, 16))
    ]
    wanted = (torch.stack(passes).mean(0).clamp(-1, 1) + 1) / 2
    torch.testing.assert_close(image, wanted.movedim(1, -1))


def test_tiles_that_hold_everything_are_the_whole() -> None:
    vae, samples, pixels = small_vae(), numbers(6, 5), gradient(48, 40)
    (whole,) = nodes.vae_decode.run(bare(), samples=samples, vae=vae)
    (tiled,) = nodes.vae_decode_tiled.run(bare(), samples=samples, vae=vae, tile_size=512, overlap=64, **VIDEO)
    torch.testing.assert_close(tiled, whole)
    (latent,) = nodes.vae_encode.run(bare(), pixels=pixels, vae=vae)
    (in_tiles,) = nodes.vae_encode_tiled.run(bare(), pixels=pixels, vae=vae, tile_size=512, overlap=64, **VIDEO)
    torch.testing.assert_close(in_tiles["samples"], latent["samples"])


def test_an_encoder_that_looks_at_single_latent_pixels_cannot_tell_tiles() -> None:
    """So each tile is cut, encoded and put back in its place."""
    vae = small_vae()
    model = vae.part()
    model.encode = lambda x: F.avg_pool2d(x, 8).repeat(1, 11, 1, 1)[:, :32]  # type: ignore[method-assign]
    pixels = gradient(200, 328)
    (latent,) = nodes.vae_encode.run(bare(), pixels=pixels, vae=vae)
    (tiled,) = nodes.vae_encode_tiled.run(bare(), pixels=pixels, vae=vae, tile_size=64, overlap=16, **VIDEO)
    torch.testing.assert_close(tiled["samples"], latent["samples"])


def test_tiles_that_are_all_overlap_are_refused() -> None:
    inputs = {"pixels": gradient(200, 328), "vae": small_vae(), "tile_size": 64, "overlap": 32}
    with pytest.raises(RequestError, match="below half of tile_size"):
        nodes.vae_encode_tiled.run(bare(), **inputs, **VIDEO)


def test_a_wide_overlap_of_decoding_is_narrowed_to_a_quarter_of_the_tile() -> None:
    vae, samples = small_vae(), numbers(20, 12)
    tiled = [
        nodes.vae_decode_tiled.run(bare(), samples=samples, vae=vae, tile_size=64, overlap=overlap, **VIDEO)[0]
        for overlap in (16, 4096)
    ]
    assert torch.equal(*tiled)


def counted(calls: list[str], fail_first: BaseException | None = None) -> Callable[[Callable[[], Any]], Any]:
    """An `on_device` that keeps count, and may fail once."""

    def on_device(work: Callable[[], Any]) -> Any:
        calls.append("call")
        if fail_first is not None and len(calls) == 1:
            raise fail_first
        return work()

    return on_device


@pytest.mark.parametrize(
    "error",
    [
        OutOfMemoryError("full"),
        torch.OutOfMemoryError("full"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_decoding_goes_on_in_tiles_when_memory_runs_out(error: BaseException) -> None:
    calls: list[str] = []
    samples, vae = numbers(6, 5), small_vae()
    (image,) = nodes.vae_decode.run(bare(on_device=counted(calls, error)), samples=samples, vae=vae)
    assert len(calls) == 4  # the whole, then one tile in each of three tilings
    torch.testing.assert_close(image, nodes.vae_decode.run(bare(), samples=samples, vae=vae)[0])


def test_other_failures_of_decoding_are_not_hidden() -> None:
    context = bare(on_device=counted([], RuntimeError("a fault of ours")))
    with pytest.raises(RuntimeError, match="a fault of ours"):
        nodes.vae_decode.run(context, samples=numbers(2, 2), vae=small_vae())


def test_tiles_are_used_where_the_models_were_loaded_to_be() -> None:
    calls: list[str] = []
    context = bare(on_device=counted(calls), tiled_vae=True)
    nodes.vae_decode.run(context, samples=numbers(6, 5), vae=small_vae())
    assert len(calls) == 3


# Batches, sizes, and what cannot be


def test_a_picture_is_the_same_in_any_company() -> None:
    vae, three = small_vae(), numbers(6, 5, 3)
    (images,) = nodes.vae_decode.run(bare(), samples=three, vae=vae)
    (alone,) = nodes.vae_decode.run(bare(), samples={"samples": three["samples"][1:2]}, vae=vae)
    assert torch.equal(images[1:2], alone)
    (latents,) = nodes.vae_encode.run(bare(), pixels=gradient(16, 24, 2), vae=vae)
    (last,) = nodes.vae_encode.run(bare(), pixels=gradient(16, 24, 2)[1:], vae=vae)
    assert torch.equal(latents["samples"][1:], last["samples"])


def test_a_cancelled_job_stops_between_tiles() -> None:
    class CancelledError(Exception):
        pass

    calls: list[str] = []

    def check() -> None:
        if len(calls) == 2:
            raise CancelledError

    context = bare(on_device=counted(calls), check=check)
    with pytest.raises(CancelledError):
        nodes.vae_decode_tiled.run(context, samples=numbers(20, 20), vae=small_vae(), tile_size=64, overlap=16, **VIDEO)
    assert len(calls) == 2


@pytest.mark.parametrize("samples", [torch.zeros(1, 4, 8, 8), torch.zeros(1, 16, 8), torch.zeros(0, 16, 8, 8)])
def test_latents_that_the_vae_does_not_know_are_refused(samples: Tensor) -> None:
    with pytest.raises(RequestError, match="16 channels"):
        nodes.vae_decode.run(bare(), samples={"samples": samples}, vae=small_vae())


def test_a_link_without_a_vae_says_what_to_do() -> None:
    with pytest.raises(RequestError, match="VAELoader"):
        nodes.vae_decode.run(bare(), samples=numbers(2, 2), vae=None)


def test_pictures_too_small_or_too_large_to_encode_are_refused() -> None:
    with pytest.raises(RequestError, match="too small"):
        nodes.vae_encode.run(bare(), pixels=gradient(7, 40), vae=small_vae())
    with pytest.raises(RequestError, match="may be drawn"):
        nodes.vae_encode.run(bare(max_pixels=1000), pixels=gradient(40, 40), vae=small_vae())


def test_numbers_that_are_none_are_an_error_and_no_black_picture() -> None:
    samples = numbers(2, 2)
    samples["samples"][0, 0, 0, 0] = torch.nan
    with pytest.raises(NumericsError, match="NaN"):
        nodes.vae_decode.run(bare(), samples=samples, vae=small_vae())


# Masks


def test_inpainting_hides_the_masked_part_from_the_encoder() -> None:
    vae, mask = small_vae(), torch.zeros(1, 48, 40)
    mask[:, 10:30, 8:20] = 1
    changed = gradient(48, 40)
    changed[:, 10:30, 8:20] = 0.123
    inputs = {"vae": vae, "mask": mask, "grow_mask_by": 6}
    (one,) = nodes.vae_encode_for_inpaint.run(bare(), pixels=gradient(48, 40), **inputs)
    (other,) = nodes.vae_encode_for_inpaint.run(bare(), pixels=changed, **inputs)
    torch.testing.assert_close(one["samples"], other["samples"])
    grey = gradient(48, 40)
    grey[:, 10:30, 8:20] = 0.5
    torch.testing.assert_close(one["samples"], nodes.vae_encode.run(bare(), pixels=grey, vae=vae)[0]["samples"])


@pytest.mark.parametrize("grow", [0, 1, 2, 5, 6, 64])
def test_the_mask_grows_by_a_square_of_so_many_pixels(grow: int) -> None:
    """ComfyUI convolves with a square of ones, padded by ceil((grow - 1) / 2), and cuts what is too much at the end."""
    mask = torch.zeros(1, 48, 40)
    mask[0, 20, 30], mask[0, 1, 2] = 1, 0.4
    (out,) = nodes.vae_encode_for_inpaint.run(
        bare(), pixels=gradient(48, 40), vae=small_vae(), mask=mask, grow_mask_by=grow
    )
    wanted = mask[None].round()
    if grow:
        wanted = F.conv2d(wanted, torch.ones(1, 1, grow, grow), padding=grow // 2)[..., :48, :40].clamp(0, 1)
    assert torch.equal(out["noise_mask"], wanted)


def test_mask_and_picture_are_cropped_alike() -> None:
    """Of 50x43 pixels the middle 48x40 is kept, one and one pixel further down and to the right."""
    mask = torch.zeros(1, 50, 43)
    mask[0, 11:21, 9:19] = 1
    (out,) = nodes.vae_encode_for_inpaint.run(
        bare(), pixels=gradient(50, 43), vae=small_vae(), mask=mask, grow_mask_by=0
    )
    assert torch.equal(out["noise_mask"][0, 0], mask[0, 1:49, 1:41])
    assert out["samples"].shape == (1, 16, 6, 5)


def test_a_mask_of_another_size_is_fitted_to_the_picture() -> None:
    mask = torch.zeros(1, 12, 10)
    mask[:, :6] = 1
    (out,) = nodes.vae_encode_for_inpaint.run(
        bare(), pixels=gradient(48, 40), vae=small_vae(), mask=mask, grow_mask_by=0
    )
    assert torch.equal(out["noise_mask"][0, 0], (torch.arange(48) < 24).float()[:, None].expand(48, 40))


def test_masks_that_do_not_fit_the_batch_are_refused() -> None:
    inputs = {"pixels": gradient(16, 16, 2), "vae": small_vae(), "mask": torch.ones(3, 16, 16), "grow_mask_by": 0}
    with pytest.raises(RequestError, match="3 masks do not fit 2 pictures"):
        nodes.vae_encode_for_inpaint.run(bare(), **inputs)


def test_a_noise_mask_is_put_beside_the_latents() -> None:
    samples = numbers(4, 4)
    mask = torch.rand(2, 32, 32)
    (out,) = nodes.set_latent_noise_mask.run(bare(), samples=samples, mask=mask)
    assert torch.equal(out["noise_mask"], mask[:, None])
    assert out["samples"] is samples["samples"]
    assert "noise_mask" not in samples
