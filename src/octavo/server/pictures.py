"""What the drawing APIs have in common: a `GenerateRequest` on its way in, picture files on their way out."""

import asyncio
import hashlib
import io
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from octavo.errors import ModelNotFoundError, RequestError, did_you_mean
from octavo.server.problems import Refused
from octavo.server.security import jail
from octavo.server.settings import Settings

if TYPE_CHECKING:
    from octavo.checkpoint.folders import Folders, ModelFile
    from octavo.checkpoint.presets import Preset
    from octavo.engine.jobs import Stored
    from octavo.pipeline.hires import Hires
    from octavo.pipeline.request import GenerateRequest
    from octavo.server.state import State

KEPT = 86400.0  # seconds that an upload stays after its last use
LONGEST_PROMPT = 20_000  # letters
MOST_PICTURES = 64  # of one request
MEDIA = {"png": "image/png", "jpeg": "image/jpeg", "jpg": "image/jpeg", "webp": "image/webp"}


@dataclass(frozen=True, slots=True)
class Made:
    """One finished picture of a job."""

    path: Path
    name: str  # within the output folder
    seed: int
    settings: Mapping[str, Any]  # of the `Job` that made it

    def image(self) -> Image.Image:
        """The picture itself, its text chunks in `info`."""
        image = Image.open(self.path)
        image.load()
        return image


def request_of(wishes: Mapping[str, Any], settings: Settings, preset: "Preset") -> "GenerateRequest":
    """A request from fields that may be None, within the server's bounds. Needs torch imported.

    Args:
        wishes: by the names of `GenerateRequest`.
        settings: of the server, for its bounds.
        preset: of the model, for the size where none is asked for.

    Raises:
        RequestError: a value out of range, or more than the server allows.
    """
    from octavo.pipeline.request import GenerateRequest
    from octavo.sampling import get_sampler, get_schedule

    hires: Hires | None = wishes.get("hires")
    prompts = [wishes.get("prompt") or "", wishes.get("negative_prompt") or ""]
    if hires is not None:
        prompts += [hires.prompt or "", hires.negative_prompt or ""]
    if max(map(len, prompts)) > LONGEST_PROMPT:
        raise RequestError(f"A prompt may have {LONGEST_PROMPT} letters here; this one has {max(map(len, prompts))}.")
    for prompt in prompts:
        if any(0xD800 <= ord(letter) < 0xE000 for letter in prompt):
            raise RequestError("The prompt has half a surrogate pair in it, which is no letter; take it out.")
    if (wishes.get("batch") or 1) > MOST_PICTURES:
        raise RequestError(f"{wishes['batch']} pictures are asked for; {MOST_PICTURES} are drawn at a time.")
    given = {name: value for name, value in wishes.items() if value is not None}
    request = GenerateRequest(**{"speed": settings.speed} | given)
    for sampler in (request.sampler, hires.sampler if hires else None):
        if sampler is not None:
            get_sampler(sampler)
    for schedule in (request.schedule, hires.schedule if hires else None):
        if schedule is not None:
            get_schedule(schedule)
    width, height = request.width or preset.width, request.height or preset.height
    if hires is not None:
        width, height = hires.size(width, height)
    if width * height > settings.max_pixels:
        usual = "" if request.width or request.height or hires else ", which suits the model,"
        raise RequestError(
            f"{width}x{height}{usual} is larger than the {settings.max_pixels} pixels that this server draws "
            "(--max-pixels). Ask for a smaller size."
        )
    return request


async def preset_of(state: "State", model: str | None) -> "Preset":
    """The settings that suit a model; it has been looked up by `known_model`."""
    works = await state.until_started()
    return (await asyncio.to_thread(works.shelf.components, model)).preset


def payload_of(request: "GenerateRequest", model: str | None, form: str = "png") -> dict[str, Any]:
    """The payload of a job of kind "generate"."""
    return {"request": request.settings, "model": model, "format": form}


def made(stored: "Stored", output_dir: Path) -> list[Made]:
    """The pictures of a finished job.

    Raises:
        Refused: 410; one of them has been deleted since.
    """
    found = []
    for each in (stored.result or {}).get("pictures", ()):
        path = jail(output_dir, each["path"])
        if not path.is_file():
            raise Refused(f"The picture {each['path']} has been deleted.", status=410, kind="gone")
        found.append(Made(path, each["path"], each["seed"], each["settings"]))
    return found


def keep_upload(image: Image.Image, uploads: Path) -> str:
    """Put a picture where the job will find it, also after a restart; returns its path.

    The name is the hash of what is in it: the same picture again is the same file, so that a request that is sent
    twice is recognised.
    """
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    data = buffer.getvalue()
    path = uploads / f"{hashlib.sha256(data).hexdigest()[:40]}.png"
    if path.exists():
        os.utime(path)
    else:
        part = path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}.part")
        part.write_bytes(data)
        os.replace(part, path)
    return str(path.absolute())


def forget_uploads(uploads: Path, used: Iterable[Mapping[str, Any]], *, older_than: float = KEPT) -> int:
    """Delete uploads that no waiting or running job needs; returns how many.

    Args:
        uploads: the folder.
        used: payloads of the jobs that are not over.
        older_than: seconds since the last use.
    """
    needed = set(_texts(used))
    gone = 0
    for path in uploads.iterdir():
        if str(path.absolute()) not in needed and time.time() - path.stat().st_mtime > older_than:
            path.unlink(missing_ok=True)
            gone += 1
    return gone


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _texts(each)
    elif isinstance(value, Iterable):
        for each in value:
            yield from _texts(each)


def encoded(image: Image.Image, form: str, *, quality: int | None = None) -> bytes:
    """A picture as PNG, JPEG or WebP, with the text chunks that it came with where it is a PNG.

    Args:
        form: "png", "jpeg" or "webp".
        quality: 0 to 100; None for 95, and for lossless WebP.
    """
    from PIL.PngImagePlugin import PngInfo

    buffer = io.BytesIO()
    if form == "png":
        text = PngInfo()
        for key, value in image.info.items():
            if isinstance(key, str) and isinstance(value, str):
                text.add_text(key, value)
        image.save(buffer, "PNG", pnginfo=text)
    elif form == "webp":
        image.save(buffer, "WEBP", **({"lossless": True} if quality is None else {"quality": quality}))
    else:
        image.convert("RGB").save(buffer, "JPEG", quality=95 if quality is None else quality)
    return buffer.getvalue()


# Models


async def check_loras(state: "State", request: "GenerateRequest") -> None:
    """Refuse LoRAs that are not there, before the request waits in line.

    Raises:
        ModelNotFoundError: says which there are.
        RequestError: the prompt asks for one in a way that makes no sense.
    """
    loras = dict.fromkeys((*request.all_loras, *request.hires_loras))
    if loras:
        works = await state.until_started()
        for lora in loras:
            await asyncio.to_thread(works.shelf.loras.find, lora.name)


async def known_model(state: "State", name: str | None) -> str | None:
    """The model that a client names, as the shelf knows it; None where it names none.

    Only what lies in the models tree can be named, and never a path.

    Raises:
        ModelNotFoundError: there is none of that name; says which there are.
    """
    if name is None or not name.strip():
        return state.settings.model
    works = await state.until_started()
    names = await asyncio.to_thread(model_names, works.shelf.folders, state.settings)
    return named(name, names)


def named(name: str, names: Mapping[str, str | None]) -> str | None:
    """What `name` means among `names`, in any case, with or without folder and suffix."""
    for form in (str, _loosely, lambda text: _loosely(Path(text).name), lambda text: _loosely(Path(text).stem)):
        wanted = form(name)
        for known, target in names.items():
            if form(known) == wanted:
                return target
    raise ModelNotFoundError(
        f"There is no model '{name[:100]}'.{did_you_mean(name, names)} There are: {', '.join(names)}."
    )


def model_names(folders: "Folders", settings: Settings) -> dict[str, str | None]:
    """What may be named, and how the shelf is told; the server's own model first."""
    from octavo.checkpoint.folders import MODELS

    own = default_name(settings)
    names: dict[str, str | None] = {own: settings.model}
    for file in folders.files(*MODELS):
        try:
            status = file.path.stat()
        except OSError:
            continue  # a link that leads nowhere
        if _loosely(Path(file.name).stem) != _loosely(own) and _draws(file, status.st_mtime_ns, status.st_size):
            names.setdefault(file.name, file.name)
    return names


@lru_cache(maxsize=4096)
def _draws(file: "ModelFile", _changed: int, _size: int) -> bool:
    """Whether a file holds a diffusion model that can be used; its header is read once for each version of it."""
    from octavo.checkpoint.library import examine

    item = examine(file)
    return "mmdit" in item.kinds and item.problem is None


def default_name(settings: Settings) -> str:
    """What the server's own model is called."""
    return "octavo-demo" if settings.model is None else Path(settings.model).name


def _loosely(name: str) -> str:
    return name.lower().replace("-", "_").replace(" ", "_").removesuffix(".safetensors")
