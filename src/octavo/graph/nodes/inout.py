"""Nodes that read files and write them: pictures, masks, latents."""

import hashlib
import json
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from octavo.errors import NumericsError, RequestError
from octavo.fp8 import all_finite
from octavo.graph.context import Context
from octavo.graph.nodes.limits import MOST_PIXELS, ROOM, check_drawn
from octavo.graph.nodes.saving import save_all
from octavo.graph.nodes.types import Latent
from octavo.graph.places import annotated_path
from octavo.graph.spec import COMBO, HIDDEN, LINK, STRING, Lists, NodeResult, NodeSpec, files, node
from octavo.pipeline.image import open_image
from octavo.pipeline.latents import FACTOR

ABOUT = {"prompt": HIDDEN("PROMPT"), "extra_pnginfo": HIDDEN("EXTRA_PNGINFO")}
PNG_LEVEL, PNG_FAST = 4, 1  # of compression; what is only looked at need not be small
NO_ALPHA = 64  # side of the empty mask of a picture without alpha, as ComfyUI has it
# SD1's latents used to be saved already scaled; a file with the mark holds what the VAE made.
OLD_SCALE, MARK = 0.18215, "latent_format_version_0"

# Writing


@node(
    "SaveImage",
    display_name="Save Image",
    category="image",
    description="Saves pictures in the output folder, with the workflow inside.",
    inputs={
        "images": LINK("IMAGE", tooltip="What to save."),
        "filename_prefix": STRING(
            "ComfyUI",
            tooltip="folder/name of the files. It may hold %date:yyyy-MM-dd%, %width% and %height%, and values of "
            "other nodes as %KSampler.seed%.",
        ),
        **ABOUT,
    },
    outputs=(),
    output_node=True,
    search_aliases=("save", "export image"),
)
def save_image(context: Context, images: Tensor, filename_prefix: str) -> NodeResult:
    return _saved(context, images, "output", filename_prefix, PNG_LEVEL)


@node(
    "PreviewImage",
    display_name="Preview Image",
    category="image",
    description="Shows pictures; they are saved in the temp folder, which is emptied when the server starts.",
    inputs={"images": LINK("IMAGE"), **ABOUT},
    outputs=(),
    output_node=True,
    search_aliases=("preview", "show image"),
)
def preview_image(context: Context, images: Tensor) -> NodeResult:
    # A name of its own, so that a browser does not show an older picture that it kept.
    letters = "".join(random.choices("abcdefghijklmnopqrstuvwxyz", k=5))
    return _saved(context, images, "temp", f"ComfyUI_temp_{letters}", PNG_FAST)


def _saved(context: Context, images: Tensor, kind: str, prefix: str, level: int) -> NodeResult:
    text = _chunks(context)
    writes = [
        partial(picture.save, format="PNG", pnginfo=text, compress_level=level) for picture in _as_pictures(images)
    ]
    height, width = images.shape[1:3]
    saved = save_all(context, kind, prefix, ".png", writes, width=width, height=height)
    return NodeResult(ui={"images": saved})


@node(
    "SaveImageWebsocket",
    category="api/image",
    module="custom_nodes.websocket_image_save",
    classic=True,
    description="Sends pictures as PNG over the websocket instead of saving them.",
    inputs={"images": LINK("IMAGE")},
    outputs=(),
    output_node=True,
    is_changed=lambda _context, **_inputs: object(),  # to be sent anew every time
)
def save_image_websocket(context: Context, images: Tensor) -> NodeResult:
    pictures = _as_pictures(images)
    for i, picture in enumerate(pictures):
        picture.format = "PNG"  # asks for the whole picture, without loss, where previews are small JPEGs
        context.progress(i, len(pictures), picture)
    return NodeResult()


def _as_pictures(images: Tensor) -> list[Image.Image]:
    """8-bit pictures of [B, H, W, C] in [0, 1], rounded to the nearest level."""
    if not all_finite(images):
        raise NumericsError("The picture holds NaN or infinity, so it is not saved; look at the nodes before this one.")
    levels = (images * 255).round().clamp(0, 255).to(torch.uint8)
    return [Image.fromarray(picture.numpy()) for picture in levels]


def _chunks(context: Context) -> PngImagePlugin.PngInfo:
    """The workflow as text chunks, where ComfyUI looks for it."""
    text = PngImagePlugin.PngInfo()
    for key, value in _metadata(context).items():
        try:
            if not 0 < len(key.encode("latin-1")) < 80:
                raise ValueError
            text.add_text(key, value)
        except ValueError as error:
            raise RequestError(
                f"extra_pnginfo has the key {key[:100]!r}, which PNG cannot hold: use 1 to 79 Latin letters."
            ) from error
    return text


def _metadata(context: Context) -> dict[str, str]:
    """What a file keeps about its making, as JSON by key."""
    if not context.metadata:
        return {}
    prompt = {"prompt": context.prompt} if context.prompt else {}
    return {key: json.dumps(value) for key, value in {**prompt, **context.extra_pnginfo}.items()}


# Reading pictures


def _must_be_there(what: str, name: object, lists: Lists) -> str | None:
    """A complaint if `name` is no file in the folder that it names."""
    try:
        there = isinstance(name, str) and annotated_path(name, lists).is_file()
    except (RequestError, OSError):
        there = False
    return None if there else f"Invalid {what} file: {name}"


def _content(context: Context, name: str | None) -> str | None:
    """Hash of a file, so that its name with other content is not taken from the cache; None if it cannot be read."""
    if name is None:
        return None
    try:
        with annotated_path(name, context).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (RequestError, OSError):
        return None


PICTURE = COMBO(files("input"), check=partial(_must_be_there, "image"), image_upload=True)
FROM_OUTPUT = COMBO(
    None,
    check=partial(_must_be_there, "image"),
    image_upload=True,
    image_folder="output",
    remote={"route": "/internal/files/output", "refresh_button": True, "control_after_refresh": "first"},
)


@node(
    "LoadImage",
    display_name="Load Image",
    category="image",
    description="A picture from the input folder; its second output is where it is transparent.",
    inputs={"image": PICTURE},
    outputs=("IMAGE", "MASK"),
    search_aliases=("open image", "upload image"),
    is_changed=lambda context, image: _content(context, image),
)
def load_image(context: Context, image: str) -> tuple[Tensor, Tensor]:
    return _loaded(context, image)


@node(
    "LoadImageOutput",
    display_name="Load Image (from Outputs)",
    category="image",
    description="A picture that was saved before.",
    inputs={"image": FROM_OUTPUT},
    outputs=("IMAGE", "MASK"),
    experimental=True,
    search_aliases=("output image",),
    is_changed=lambda context, image: _content(context, image),
)
def load_image_output(context: Context, image: str) -> tuple[Tensor, Tensor]:
    return _loaded(context, image)


@node(
    "LoadImageMask",
    display_name="Load Image (as Mask)",
    category="mask",
    description="One channel of a picture as a mask; of alpha, what is transparent.",
    inputs={"image": PICTURE, "channel": COMBO(("alpha", "red", "green", "blue"))},
    outputs=("MASK",),
    search_aliases=("import mask",),
    is_changed=lambda context, image, channel: _content(context, image),  # noqa: ARG005
)
def load_image_mask(context: Context, image: str, channel: str) -> tuple[Tensor]:
    context.check()
    with _opened(context, image) as picture:
        upright = _eight_bits(ImageOps.exif_transpose(picture)).convert("RGBA")
    plane = _plane(upright, channel[0].upper())
    return ((1 - plane if channel == "alpha" else plane).unsqueeze(0),)


def _loaded(context: Context, name: str) -> tuple[Tensor, Tensor]:
    """The picture [B, H, W, 3], one of a batch for each frame, and the mask [B, h, w] of what is transparent in it.

    Where nothing is, the mask is empty and of 64x64 pixels, as in ComfyUI.
    """
    most = _most(context)
    pictures, masks = list[Tensor](), list[Tensor | None]()
    with _opened(context, name) as image:
        for frame in _frames(image, name, most):
            context.check()
            upright = _eight_bits(ImageOps.exif_transpose(frame))
            transparent = upright.has_transparency_data
            if transparent:
                upright = upright.convert("RGBA")
            picture = _tensor(upright.convert("RGB"))
            if pictures and picture.shape != pictures[0].shape:
                continue  # a thumbnail among the pages
            if (len(pictures) + 1) * picture[..., 0].numel() > most:
                raise RequestError(f"{name} has so many frames that they have more than {most:,} pixels together.")
            pictures.append(picture)
            masks.append(1 - _plane(upright, "A") if transparent else None)
    size = pictures[0].shape[:2] if any(mask is not None for mask in masks) else (NO_ALPHA, NO_ALPHA)
    return torch.stack(pictures), torch.stack([torch.zeros(size) if mask is None else mask for mask in masks])


def _opened(context: Context, name: str) -> Image.Image:
    return open_image(annotated_path(name, context), max_pixels=_most(context))


def _most(context: Context) -> int:
    """Pixels that a file may have, all frames together."""
    return min(MOST_PIXELS, ROOM * context.max_pixels)


def _frames(image: Image.Image, name: str, most: int) -> Iterator[Image.Image]:
    """The frames of a picture; of a phone's stereo or HDR file (MPO) only the first, which is the picture itself."""
    try:
        for number in range(1 if image.format == "MPO" else getattr(image, "n_frames", 1)):
            image.seek(number)
            if image.width * image.height > most:
                raise RequestError(f"Frame {number + 1} of {name} has more than {most:,} pixels.")
            image.load()
            yield image
    except (EOFError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise RequestError(f"{name} cannot be read as a picture: {error or 'it ends too early'}.") from error


def _eight_bits(image: Image.Image) -> Image.Image:
    """The picture in 8 bits a channel; Pillow's own way from 16 bits of grey clips instead of scaling."""
    if not image.mode.startswith("I"):
        return image
    levels = np.asarray(image, np.float32).clip(0, 65535) / 257
    return Image.fromarray(levels.round().astype(np.uint8))


def _tensor(image: Image.Image) -> Tensor:
    """[H, W] or [H, W, C] in [0, 1]."""
    return torch.from_numpy(np.asarray(image, np.float32) / 255)


def _plane(image: Image.Image, channel: str) -> Tensor:
    return _tensor(image.getchannel(channel))


# Latents


def _latent_files(lists: Lists) -> list[str]:
    try:
        return sorted(path.name for path in lists.input_dir.iterdir() if path.suffix == ".latent" and path.is_file())
    except OSError:
        return []


@node(
    "SaveLatent",
    display_name="SaveLatent",
    category="_for_testing",
    description="Saves latents in the output folder, without their noise mask.",
    inputs={"samples": LINK("LATENT"), "filename_prefix": STRING("latents/ComfyUI"), **ABOUT},
    outputs=(),
    output_node=True,
    search_aliases=("export latent",),
)
def save_latent(context: Context, samples: Latent, filename_prefix: str) -> NodeResult:
    tensors = {"latent_tensor": samples["samples"].contiguous(), MARK: torch.empty(0)}
    write = partial(_write_tensors, tensors, _metadata(context))
    return NodeResult(ui={"latents": save_all(context, "output", filename_prefix, ".latent", [write])})


def _write_tensors(tensors: dict[str, Tensor], metadata: dict[str, str], path: Path) -> None:
    save_file(tensors, path, metadata=metadata)


@node(
    "LoadLatent",
    display_name="LoadLatent",
    category="_for_testing",
    description="Latents from the input folder, as SaveLatent saved them.",
    inputs={"latent": COMBO(_latent_files, check=partial(_must_be_there, "latent"))},
    outputs=("LATENT",),
    search_aliases=("import latent",),
    is_changed=lambda context, latent: _content(context, latent),
)
def load_latent(context: Context, latent: str) -> tuple[Latent]:
    context.check()
    try:
        tensors = load_file(annotated_path(latent, context))
    except (SafetensorError, OSError, ValueError) as error:
        raise RequestError(f"{latent} cannot be read as latents: {error}. Give a file that SaveLatent made.") from error
    x = tensors.get("latent_tensor")
    if x is None or x.ndim != 4 or not x.numel() or not all_finite(x.float()):
        raise RequestError(f"{latent} holds no latents [batch, channels, height, width]; give a file of SaveLatent.")
    check_drawn(context, x.shape[3] * FACTOR, x.shape[2] * FACTOR, len(x))
    return ({"samples": x.float() if MARK in tensors else x.float() / OLD_SCALE},)


NODES: tuple[NodeSpec, ...] = (
    save_image,
    preview_image,
    save_image_websocket,
    load_image,
    load_image_output,
    load_image_mask,
    save_latent,
    load_latent,
)
