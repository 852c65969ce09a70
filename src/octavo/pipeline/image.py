"""Pictures as files, with the request that made them inside: ours as JSON, and A1111's `parameters` line.

PNG keeps both as text chunks (`octavo`, `parameters`); JPEG and WebP keep them in EXIF, where A1111's readers look
(UserComment) and, for ours, in ImageDescription.
"""

import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image, PngImagePlugin, UnidentifiedImageError

from octavo.errors import RequestError
from octavo.text.lora_tags import as_tag

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
# A1111 counts EXIF text as Unicode when it starts with this.
UNICODE = b"UNICODE\0"

Settings = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Picture:
    """One finished picture."""

    image: Image.Image  # RGB
    settings: Settings  # what made it, see `request.GenerateRequest.settings`; empty for nothing known
    notes: Mapping[str, str] = field(default_factory=dict)  # more text for a PNG, by its keys

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write PNG, JPEG or WebP (by the suffix) with the settings inside; whole or not at all.

        Returns:
            The path written.

        Raises:
            RequestError: a suffix of another format, or a folder that cannot be written.
        """
        path = Path(path)
        form = picture_format(path)
        part = part_of(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if form == "PNG":
                text = PngImagePlugin.PngInfo()
                for key, value in self.notes.items():
                    if not (self.settings and key == "parameters"):
                        text.add_text(key, value)
                if self.settings:
                    text.add_text("parameters", a1111_parameters(self.settings))
                    text.add_text("octavo", json.dumps(self.settings))
                self.image.save(part, form, pnginfo=text)
            else:
                exif = Image.Exif()
                if self.settings:
                    exif[ExifTags.Base.ImageDescription] = json.dumps(self.settings)
                    comment = UNICODE + a1111_parameters(self.settings).encode("utf-16-be", "replace")
                    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = comment
                lossless = {"lossless": True} if form == "WEBP" else {"quality": 95, "subsampling": 0}
                self.image.save(part, form, exif=exif, **lossless)
            os.replace(part, path)
        except OSError as error:
            with suppress(OSError):  # where the folder is none, or cannot be written
                part.unlink(missing_ok=True)
            raise RequestError(f"Cannot write {path}: {error.strerror or error}. Choose another --out.") from error
        return path


def part_of(path: Path) -> Path:
    """Where `Picture.save` writes: beside the target, so that an interruption never leaves half a picture there."""
    return path.with_name(f".{path.name}.{os.getpid()}.part")


def picture_format(path: Path) -> str:
    """Pillow's name of the format that the suffix asks for."""
    form = FORMATS.get(path.suffix.lower())
    if form is None:
        raise RequestError(f"'{path.name}' has no picture format Octavo writes; end it in .png, .webp or .jpg.")
    return form


def read_settings(path: str | os.PathLike[str]) -> Settings:
    """What `Picture.save` put into a file.

    Raises:
        RequestError: no such file, no picture, or a picture without our settings.
    """
    path = Path(path)
    image = open_image(path)
    text = image.info.get("octavo") or image.getexif().get(ExifTags.Base.ImageDescription)
    try:
        settings = json.loads(text) if isinstance(text, str) else None
    except ValueError:
        settings = None
    if not isinstance(settings, dict) or "prompt" not in settings:
        raise RequestError(f"{path.name} holds no Octavo settings; it was made or re-saved by another program.")
    return settings


def open_image(path: str | os.PathLike[str], *, max_pixels: int | None = None) -> Image.Image:
    """A picture file, fully read.

    Args:
        max_pixels: the most that it may have; None for Pillow's own limit.

    Raises:
        RequestError: missing, unreadable, damaged, or too large to be meant.
    """
    path = Path(path)
    try:
        image = Image.open(path, formats=("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"))
        if max_pixels is not None and image.width * image.height > max_pixels:
            image.close()
            raise RequestError(
                f"{path.name} is {image.width}x{image.height} and so has {image.width * image.height:,} pixels; "
                f"{max_pixels:,} are the most. Make it smaller."
            )
        try:
            image.load()
        except BaseException:
            image.close()
            raise
    except FileNotFoundError as error:
        raise RequestError(f"There is no file {path}.") from error
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError, SyntaxError) as error:
        raise RequestError(f"{path.name} cannot be read as a picture: {error}.") from error
    return image


def a1111_parameters(settings: Settings) -> str:
    """The settings as AUTOMATIC1111 writes them: prompt with its LoRAs, negative prompt, then pairs on one line."""
    pairs = {
        "Steps": settings.get("steps"),
        "Sampler": settings.get("sampler"),
        "Schedule type": settings.get("schedule"),
        "CFG scale": settings.get("guidance_scale"),
        "Seed": settings.get("seed"),
        "Size": f"{settings.get('width')}x{settings.get('height')}",
        "Model": settings.get("model"),
        "Denoising strength": settings.get("denoise") if settings.get("image") else None,
        **_hires_pairs(settings.get("hires") or {}),
        "Shift": settings.get("shift"),
        "Version": f"Octavo {settings.get('version')}",
    }
    line = ", ".join(f"{key}: {_quoted(str(value))}" for key, value in pairs.items() if value is not None)
    negative = settings.get("negative_prompt")
    tags = [as_tag(**lora) for lora in settings.get("loras", ())]
    prompt = " ".join([settings["prompt"], *tags])
    return "\n".join([prompt, *([f"Negative prompt: {negative}"] if negative else []), line])


def _hires_pairs(hires: Settings) -> Settings:
    """A second pass as AUTOMATIC1111 writes it."""
    if not hires:
        return {}
    tags = [as_tag(**lora) for lora in hires.get("loras", ())]
    return {
        "Denoising strength": hires.get("denoise"),
        "Hires resize": f"{hires.get('width')}x{hires.get('height')}",
        "Hires steps": hires.get("steps"),
        "Hires upscaler": hires.get("method"),
        "Hires CFG Scale": hires.get("guidance_scale"),
        "Hires sampler": hires.get("sampler"),
        "Hires schedule type": hires.get("schedule"),
        "Hires prompt": " ".join([hires.get("prompt") or "", *tags]).strip() or None,
        "Hires negative prompt": hires.get("negative_prompt"),
    }


def _quoted(value: str) -> str:
    """As it is, or as a JSON string where commas, colons or line ends would break the line apart."""
    return json.dumps(value) if re.search(r"[,:\n]", value) else value
