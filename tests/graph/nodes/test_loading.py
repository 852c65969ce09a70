"""Pictures, masks and latents read from files."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from octavo.errors import RequestError
from octavo.graph.context import Context
from octavo.graph.nodes import NODES, inout
from octavo.graph.nodes.types import Latent
from octavo.graph.workflow import InvalidPrompt, validate
from tests.graph.nodes.bare import bare, gradient
from tests.graph.nodes.runs import use


@pytest.fixture
def context(tmp_path: Path) -> Context:
    for name in ("input", "output", "temp"):
        (tmp_path / name).mkdir()
    return bare(tmp_path)


def pixels(mode: str, height: int = 4, width: int = 6) -> Image.Image:
    rgb = (gradient(height, width)[0] * 255).round().to(torch.uint8).numpy()
    return Image.fromarray(rgb).convert(mode)


def load(context: Context, name: str) -> tuple[Tensor, Tensor]:
    image, mask = inout.load_image.run(context, image=name)
    assert image.dtype == mask.dtype == torch.float32
    return image, mask


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tiff", ".webp"])
def test_pixels_are_read_as_they_are(context: Context, suffix: str) -> None:
    options: dict[str, Any] = {"lossless": True} if suffix == ".webp" else {}
    pixels("RGB").save(context.input_dir / f"a{suffix}", **options)
    image, mask = load(context, f"a{suffix}")
    torch.testing.assert_close(image, gradient(4, 6))
    # As in ComfyUI, a picture without transparency has an empty mask of this size.
    assert torch.equal(mask, torch.zeros(1, 64, 64))


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK"])
def test_other_modes_become_red_green_and_blue(context: Context, mode: str) -> None:
    suffix = "tiff" if mode == "CMYK" else "png"
    pixels(mode).save(context.input_dir / f"a.{suffix}")
    image, _ = load(context, f"a.{suffix}")
    wanted = torch.from_numpy(np.asarray(pixels(mode).convert("RGB"), np.float32) / 255)
    torch.testing.assert_close(image[0], wanted)


def test_sixteen_bits_of_grey_are_scaled_and_not_clipped(context: Context) -> None:
    levels = np.array([[0, 257, 0x8080, 65535]], np.uint16)
    Image.fromarray(levels).save(context.input_dir / "a.png")
    image, _ = load(context, "a.png")
    torch.testing.assert_close(image[0, 0, :, 0] * 255, torch.tensor([0.0, 1, 128, 255]))


@pytest.mark.parametrize("form", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_the_mask(context: Context, form: str) -> None:
    image = pixels("L").convert("LA" if form == "LA" else "RGBA")
    image.putalpha(Image.fromarray(np.array([[0, 255, 64] * 2] * 4, np.uint8)))
    if form == "P":
        image = pixels("RGB").quantize(3)
        image.info["transparency"] = bytes([0, 255, 64])
        alpha = np.array([0, 255, 64], np.float32)[np.asarray(image)]
    else:
        alpha = np.asarray(image.getchannel("A"), np.float32)
    image.save(context.input_dir / "a.png")
    _, mask = load(context, "a.png")
    torch.testing.assert_close(mask[0], torch.from_numpy(1 - alpha / 255))


def test_cameras_held_upright_are_turned(context: Context) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    pixels("RGB").save(context.input_dir / "a.png", exif=exif)
    image, _ = load(context, "a.png")
    torch.testing.assert_close(image[0], gradient(4, 6)[0].rot90(-1))
    (mask,) = inout.load_image_mask.run(context, image="a.png", channel="red")
    assert mask.shape == (1, 6, 4)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tiff"])
def test_frames_become_a_batch(context: Context, suffix: str) -> None:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    frames = [Image.new("RGB", (6, 4), colour) for colour in colours]
    options: dict[str, Any] = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(context.input_dir / f"a.{suffix}", save_all=True, append_images=frames[1:], **options)
    image, mask = load(context, f"a.{suffix}")
    wanted = torch.tensor(colours).view(3, 1, 1, 3).expand(3, 4, 6, 3) / 255
    torch.testing.assert_close(image, wanted)
    assert len(mask) == 3


def test_pages_of_another_size_are_thumbnails_and_left_out(context: Context) -> None:
    pages = [pixels("RGB"), pixels("RGB", 2, 3), pixels("RGB")]
    pages[0].save(context.input_dir / "a.tiff", save_all=True, append_images=pages[1:])
    assert load(context, "a.tiff")[0].shape == (2, 4, 6, 3)


@pytest.mark.parametrize("kind", ["input", "output", "temp"])
@pytest.mark.parametrize("place", ["a.png", "sub/a.png"])
def test_a_name_may_say_which_folder_it_is_in(context: Context, kind: str, place: str) -> None:
    path = getattr(context, f"{kind}_dir") / place
    path.parent.mkdir(exist_ok=True)
    pixels("RGB").save(path)
    assert load(context, f"{place} [{kind}]")[0].shape == (1, 4, 6, 3)
    if kind == "input":
        assert load(context, place)[0].shape == (1, 4, 6, 3)


OUTSIDE = [
    "../secret.png",
    "sub/../../secret.png",
    "link.png",
    "/etc/passwd",
    "..\\secret.png",
    "../secret.png [output]",
]


@pytest.mark.parametrize("name", [*OUTSIDE, "nosuch.png", "", ".", "sub", "a\0b", "x" * 5000])
@pytest.mark.parametrize("kind", ["LoadImage", "LoadImageMask", "LoadImageOutput", "LoadLatent"])
def test_files_outside_and_files_that_are_not_there_are_refused_before_the_run(
    context: Context, kind: str, name: str
) -> None:
    """As ComfyUI's recorded answer says it."""
    pixels("RGB").save(context.input_dir.parent / "secret.png")
    (context.input_dir / "link.png").symlink_to(context.input_dir.parent / "secret.png")
    (context.input_dir / "sub").mkdir()
    key = "latent" if kind == "LoadLatent" else "image"
    inputs = {key: name} | ({"channel": "red"} if kind == "LoadImageMask" else {})
    prompt: dict[str, Any] = {"1": use(kind, **inputs), "2": use("PreviewAny", source=["1", 0])}
    with pytest.raises(InvalidPrompt) as refused:
        validate(prompt, NODES, Folders(context))
    (error,) = refused.value.node_errors["1"]["errors"]
    assert error["type"] == "custom_validation_failed"
    assert error["details"] == f"{key} - Invalid {key} file: {name}"


class Folders:
    """A context's folders as the checks of a prompt want them."""

    def __init__(self, context: Context) -> None:
        self.input_dir, self.output_dir, self.temp_dir = context.input_dir, context.output_dir, context.temp_dir

    def names(self, _category: str) -> list[str]:
        return []


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_files_that_are_no_pictures_are_refused(context: Context, content: bytes) -> None:
    (context.input_dir / "a.png").write_bytes(content)
    with pytest.raises(RequestError, match=r"a\.png cannot be read as a picture"):
        load(context, "a.png")


def test_half_a_picture_is_refused(context: Context) -> None:
    path = context.input_dir / "a.png"
    pixels("RGB", 60, 60).save(path)
    path.write_bytes(path.read_bytes()[:-900])
    with pytest.raises(RequestError, match="cannot be read"):
        load(context, "a.png")


@pytest.mark.parametrize("frames", [1, 3])
def test_bombs_are_refused(tmp_path: Path, frames: int) -> None:
    """A picture may have 16 times as many pixels as may be drawn, all its frames together."""
    stills = [Image.new("L", (80, 80), i) for i in range(frames)]
    (tmp_path / "input").mkdir()
    stills[0].save(tmp_path / "input" / "a.gif", save_all=True, append_images=stills[1:])
    assert load(bare(tmp_path, max_pixels=frames * 400), "a.gif")[0].shape == (frames, 80, 80, 3)
    with pytest.raises(RequestError, match="pixels"):
        load(bare(tmp_path, max_pixels=frames * 400 - 1), "a.gif")


def test_only_picture_formats_are_opened(context: Context) -> None:
    """PostScript, for one, would start a program."""
    (context.input_dir / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")
    with pytest.raises(RequestError, match="cannot be read as a picture"):
        load(context, "a.png")


def test_a_file_with_other_content_counts_as_changed(context: Context) -> None:
    is_changed = inout.load_image.is_changed
    assert is_changed is not None
    pixels("RGB").save(context.input_dir / "a.png")
    shutil.copy(context.input_dir / "a.png", context.input_dir / "b.png")
    assert is_changed(context, image="a.png") == is_changed(context, image="b.png")
    pixels("RGB", 5, 5).save(context.input_dir / "a.png")
    assert is_changed(context, image="a.png") != is_changed(context, image="b.png")
    assert is_changed(context, image=None) is None
    assert is_changed(context, image="nosuch.png") is None


@pytest.mark.parametrize("channel", ["red", "green", "blue", "alpha"])
def test_a_channel_as_a_mask(context: Context, channel: str) -> None:
    image = pixels("RGB")
    image.putalpha(Image.fromarray(np.arange(24, dtype=np.uint8).reshape(4, 6) * 10))
    image.save(context.input_dir / "a.png")
    (mask,) = inout.load_image_mask.run(context, image="a.png", channel=channel)
    plane = torch.from_numpy(np.asarray(image.getchannel(channel[0].upper()), np.float32) / 255)
    torch.testing.assert_close(mask, (1 - plane if channel == "alpha" else plane)[None])


# Latents


def test_saved_latents_come_back(context: Context) -> None:
    samples: Latent = {"samples": torch.randn(2, 16, 4, 6)}
    result = inout.save_latent.run(context, samples=samples, filename_prefix="latents/x")
    assert result.ui == {"latents": [{"filename": "x_00001_.latent", "subfolder": "latents", "type": "output"}]}
    shutil.copy(context.output_dir / "latents" / "x_00001_.latent", context.input_dir / "a.latent")
    (back,) = inout.load_latent.run(context, latent="a.latent")
    assert torch.equal(back["samples"], samples["samples"])
    (from_output,) = inout.load_latent.run(context, latent="latents/x_00001_.latent [output]")
    assert torch.equal(from_output["samples"], samples["samples"])
    assert inout.load_latent.inputs["latent"].choose_from(Folders(context)) == ["a.latent"]


def test_old_files_hold_scaled_latents(context: Context) -> None:
    save_file({"latent_tensor": torch.full((1, 4, 2, 2), 0.18215)}, context.input_dir / "a.latent")
    (latent,) = inout.load_latent.run(context, latent="a.latent")
    torch.testing.assert_close(latent["samples"], torch.ones(1, 4, 2, 2))


@pytest.mark.parametrize("tensors", [{"other": torch.ones(1)}, {"latent_tensor": torch.ones(3)}, None])
def test_files_that_hold_no_latents_are_refused(context: Context, tensors: dict[str, Tensor] | None) -> None:
    path = context.input_dir / "a.latent"
    if tensors is None:
        path.write_bytes(b"nothing of the kind")
    else:
        save_file(tensors, path)
    with pytest.raises(RequestError, match=r"a\.latent"):
        inout.load_latent.run(context, latent="a.latent")
