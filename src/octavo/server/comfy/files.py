"""Pictures in and out: `/view`, `/upload/image`, `/upload/mask`.

A name never leads out of its folder, what is uploaded must be a picture that can be decoded, and nothing is sent as a
type that a browser would run.
"""

import json
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from threading import Lock
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import APIRouter, File, Form, Response, UploadFile
from fastapi.responses import FileResponse
from PIL import Image, PngImagePlugin

from octavo.errors import RequestError
from octavo.server.comfy.store import write_whole
from octavo.server.limits import open_picture
from octavo.server.problems import Refused
from octavo.server.security import jail
from octavo.server.settings import Settings
from octavo.server.state import TheState

router = APIRouter(tags=["ComfyUI: pictures"])

# First bytes of the formats that `limits.open_picture` reads, and the endings that their files may have; the first is
# given to a file that has none of them.
ENDINGS: Mapping[bytes, tuple[str, ...]] = {b"\x89PNG": (".png",), b"\xff\xd8": (".jpg", ".jpeg"), b"RIFF": (".webp",)}
# What is sent under its own type; all else is bytes to save, so that no uploaded page or script runs as ours.
TYPES: Mapping[str, str] = {
    ".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp", ".gif": "image/gif",
    ".bmp": "image/bmp", ".tif": "image/tiff", ".tiff": "image/tiff", ".json": "application/json",
    ".txt": "text/plain", ".css": "text/css",
}  # fmt: skip
PREVIEW_QUALITY = 90  # of JPEG and WebP, where the client names none
LONGEST_STEM = 150  # letters of an uploaded file's name before its ending
SIGNS_OF_PATHS = '<>:"|?*%'  # not in names we make: other systems refuse them, or take them for something else

_naming = Lock()  # between choosing a free name and taking it


@router.get("/view", response_class=Response)
def view(
    state: TheState,
    filename: str | None = None,
    type: str = "output",
    subfolder: str = "",
    preview: str | None = None,
    channel: str = "",
) -> Response:
    """A picture, as it is or made smaller.

    Args:
        filename: may end in ` [input]`, ` [output]` or ` [temp]`, which counts before `type`.
        type: the folder: input, output or temp.
        subfolder: below it.
        preview: `webp;50` or `jpeg;90`: another format, for looking only.
        channel: `rgb` without transparency, `a` nothing but it; all, else.
    """
    if filename is None:
        raise Refused("Name a file: ?filename=NAME.", status=404, kind="not_found")
    bare, kind = annotated(filename, type)
    path = find(state.settings, bare, kind, subfolder)
    if preview is None and channel not in ("rgb", "a"):
        return file_answer(path)
    image = _opened(state.settings, path.read_bytes(), "filename")
    if preview is not None:
        content, media_type = _preview(image, preview, channel)
    else:
        content, media_type = _png(image.convert("RGB") if channel == "rgb" else _alpha(image)), "image/png"
    return Response(content, media_type=media_type, headers={"Content-Disposition": disposition(path.name)})


@router.post("/upload/image")
def upload_image(
    state: TheState,
    image: Annotated[UploadFile | None, File(description="PNG, JPEG or WebP")] = None,
    overwrite: Annotated[str, Form(description="`true`: take the place of a file of that name")] = "",
    type: Annotated[str, Form(description="input, output or temp")] = "input",
    subfolder: Annotated[str, Form()] = "",
) -> dict[str, str]:
    """Keep a picture. The answer says the name it got: another one where that was taken by another picture."""
    content, name = _sent(image)
    _opened(state.settings, content, "image")
    return keep(state.settings, content, clean_name(name, content), type, subfolder, overwrite=_true(overwrite))


@router.post("/upload/mask")
def upload_mask(
    state: TheState,
    image: Annotated[UploadFile | None, File(description="its transparency is the mask")] = None,
    original_ref: Annotated[str, Form(description='{"filename", "type", "subfolder"} of the picture below')] = "",
    overwrite: Annotated[str, Form()] = "",
    type: Annotated[str, Form()] = "input",
    subfolder: Annotated[str, Form()] = "",
) -> dict[str, str]:
    """Keep a picture that was uploaded or made before, with another transparency."""
    content, name = _sent(image)
    mask = _opened(state.settings, content, "image")
    original = _opened(state.settings, _original(state.settings, original_ref).read_bytes(), "original_ref")
    if mask.size != original.size:
        raise Refused(
            f"The mask is {mask.width}x{mask.height}, its picture {original.width}x{original.height}: "
            "send a mask of the picture's size."
        )
    texts = {key: value for key, value in original.info.items() if isinstance(key, str) and isinstance(value, str)}
    whole = original.convert("RGBA")
    whole.putalpha(mask.convert("RGBA").getchannel("A"))
    made = _png(whole, texts)
    return keep(state.settings, made, clean_name(name, made), type, subfolder, overwrite=_true(overwrite))


def find(settings: Settings, name: str, kind: str, subfolder: str = "") -> Path:
    """The file that a client means.

    Raises:
        Refused: 400 for a name or kind that makes no sense, 403 for a subfolder outside, 404 where there is no file.
    """
    folder = _subfolder(settings, kind, subfolder, status=403)
    if not name or name.startswith("/") or ".." in name:
        raise Refused(f"'{name[:100]}' is no name of a file here.", param="filename")
    try:
        path = jail(folder, name)
    except RequestError as error:
        raise Refused(str(error), param="filename") from None
    if not path.is_file():
        raise Refused(f"There is no file '{name[:200]}' in the {kind} folder.", status=404, kind="not_found")
    return path


def annotated(name: str, kind: str) -> tuple[str, str]:
    """`"a.png [input]"` is file `a.png` of the kind `input`; a name without such an end is of the given kind."""
    for each in ("input", "output", "temp"):
        if name.endswith(f"[{each}]"):
            return name[: -len(each) - 2].rstrip(), each
    return name, kind


def keep(
    settings: Settings, content: bytes, name: str, kind: str, subfolder: str, *, overwrite: bool
) -> dict[str, str]:
    """Write an uploaded file under its name, or `name (1).png` and so on where another file has that.

    Returns:
        `name`, `subfolder` and `type`, by which the file is found again. The same bytes sent twice are one file.

    Raises:
        Refused: 400; a folder that makes no sense, or the disk says no.
    """
    folder = _subfolder(settings, kind, subfolder, status=400)
    path, number = folder / name, 0
    try:
        with _naming:
            while not overwrite and path.exists():
                if path.is_file() and path.stat().st_size == len(content) and path.read_bytes() == content:
                    break
                number += 1
                path = folder / f"{Path(name).stem} ({number}){Path(name).suffix}"
            else:
                write_whole(path, content)
    except OSError as error:
        raise Refused(f"'{name}' cannot be kept: {error.strerror}. Choose another name.") from error
    return {"name": path.name, "subfolder": subfolder, "type": kind}


def clean_name(name: str, content: bytes) -> str:
    """A name as an upload gives it, as the last part of a path that every system takes.

    Args:
        content: a picture; the name gets the ending of its format where it has none or another.
    """
    endings = next(endings for beginning, endings in ENDINGS.items() if content.startswith(beginning))
    last = name.replace("\\", "/").rpartition("/")[2]
    plain = "".join(letter for letter in last if letter.isprintable() and letter not in SIGNS_OF_PATHS).strip(" .")
    stem, dot, suffix = plain.rpartition(".")
    if not dot or f".{suffix.lower()}" not in endings:
        stem, suffix = plain, endings[0][1:]
    return f"{stem[:LONGEST_STEM].strip(' .') or 'picture'}.{suffix}"


def file_answer(path: Path) -> FileResponse:
    """A file as it is, in parts where the client asks for them, under a type that no browser runs."""
    return FileResponse(
        path,
        media_type=TYPES.get(path.suffix.lower(), "application/octet-stream"),
        headers={"Content-Disposition": disposition(path.name), "X-Content-Type-Options": "nosniff"},
    )


def disposition(name: str) -> str:
    """The name a browser should save a file under, as a header can say it."""
    if name.isascii() and name.isprintable() and not set('"\\') & set(name):
        return f'filename="{name}"'
    return f"filename*=utf-8''{quote(name)}"


def _subfolder(settings: Settings, kind: str, subfolder: str, *, status: int) -> Path:
    folders = {"input": settings.inputs, "output": settings.output_dir, "temp": settings.temp_dir}
    if kind not in folders:
        raise Refused(f"There is no folder '{kind[:100]}': the type is one of {', '.join(folders)}.", param="type")
    if not subfolder:
        return folders[kind].resolve()
    try:
        return jail(folders[kind], subfolder.rstrip("/"))
    except RequestError as error:
        raise Refused(str(error), status=status, kind="forbidden", param="subfolder") from None


def _sent(image: UploadFile | None) -> tuple[bytes, str]:
    if image is None or not image.filename:
        raise Refused("Send the picture as the form's field 'image', with a filename.", param="image")
    return image.file.read(), image.filename


def _opened(settings: Settings, content: bytes, field: str) -> Image.Image:
    return open_picture(content, max_pixels=settings.max_upload_pixels, field=field)


def _original(settings: Settings, text: str) -> Path:
    """The picture that a mask belongs to."""
    try:
        ref = json.loads(text)
    except (ValueError, RecursionError):
        ref = None
    if not isinstance(ref, dict) or not isinstance(ref.get("filename"), str):
        raise Refused('original_ref should be JSON such as {"filename": "a.png", "type": "input", "subfolder": ""}.')
    kind, subfolder = ref.get("type") or "output", ref.get("subfolder") or ""
    if not isinstance(kind, str) or not isinstance(subfolder, str):
        raise Refused("The type and subfolder of original_ref should be texts.", param="original_ref")
    return find(settings, *annotated(ref["filename"], kind), subfolder)


def _preview(image: Image.Image, wanted: str, channel: str) -> tuple[bytes, str]:
    """The picture as the `preview` parameter asks, and its type."""
    form, _, quality = wanted.partition(";")
    form = "jpeg" if form == "jpeg" and "a" not in channel else "webp"
    chosen = min(int(quality), 100) if quality.isascii() and quality.isdigit() and len(quality) < 5 else PREVIEW_QUALITY
    has_alpha = form == "webp" and channel != "rgb" and (image.mode == "RGBA" or "a" in channel)
    buffer = BytesIO()
    image.convert("RGBA" if has_alpha else "RGB").save(buffer, form.upper(), quality=chosen)
    return buffer.getvalue(), f"image/{form}"


def _alpha(image: Image.Image) -> Image.Image:
    """A black picture with the transparency of `image`."""
    alone = Image.new("RGBA", image.size)
    alone.putalpha(image.convert("RGBA").getchannel("A"))
    return alone


def _png(image: Image.Image, texts: Mapping[str, Any] | None = None) -> bytes:
    buffer, info = BytesIO(), PngImagePlugin.PngInfo()
    for key, value in (texts or {}).items():
        info.add_text(key[:79], value)
    image.save(buffer, "PNG", pnginfo=info, compress_level=1)
    return buffer.getvalue()


def _true(word: str) -> bool:
    return word.lower() in ("true", "1")
