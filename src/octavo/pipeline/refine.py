"""A part of a picture drawn anew at the model's full size, and put back: for hands, faces, and whatever came out small.

The part is cut out with some of what is around it, enlarged to the size that the model likes best, drawn from with a
prompt of its own, made small again and blended in. Outside of the mask and its feather no pixel changes.
"""

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from octavo.checkpoint.presets import Preset
from octavo.errors import RequestError
from octavo.pipeline.components import Components
from octavo.pipeline.control_request import ControlImage
from octavo.pipeline.editing import read_mask, shaped
from octavo.pipeline.generate import Watcher, generate
from octavo.pipeline.image import Picture, open_image
from octavo.pipeline.inpaint import flat, prepare
from octavo.pipeline.latents import upright
from octavo.pipeline.request import GenerateRequest

NOTE = "octavo_refine"  # in a PNG: what was refined, a JSON list
KEPT = ("parameters", "prompt", "workflow")  # what other programs write into a PNG
SMALLEST = 8  # pixels a side of a region
DENOISE = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Refinement:
    """Which part, and how it is put back."""

    region: tuple[int, int, int, int] | None = None  # x, y, width, height in pixels
    mask: str | None = None  # path of a picture, white where it is drawn anew; instead of a region
    context: int = 32  # pixels around it that the model sees, and does not change
    feather: int = 8  # pixels over which new and old are blended
    follow_edges: float = 0.0  # strength of a Canny ControlNet that keeps the part's outlines; 0 is none

    def __post_init__(self) -> None:
        if (self.region is None) == (self.mask is None):
            raise RequestError("Say what to refine: either a region, such as 40,60,128,96, or a mask.")
        for name, most in (("context", 4096), ("feather", 1024)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
                raise RequestError(f"{name} {value!r} is out of range: whole pixels from 0 to {most}.")


def refine(
    components: Components,
    picture: str,
    request: GenerateRequest,
    refinement: Refinement,
    *,
    denoise: float = DENOISE,
    watch: Watcher | None = None,
) -> Picture:
    """Draw a part of a picture anew.

    Args:
        components: a loaded model.
        picture: path of the picture.
        request: prompt, LoRAs, seed and all else for the part; its size is what the part is enlarged to, the model's
            own where it says none.
        refinement: which part.
        denoise: how much of the part is made anew.
        watch: as in `generate`.

    Returns:
        The whole picture. It carries what the picture carried, and beside it, as `octavo_refine`, what was done here.

    Raises:
        RequestError: a part that is not in the picture, or a file that cannot be read.
    """
    with refining(components.preset, picture, request, refinement, denoise=denoise) as part:
        (drawn,) = generate(components, part.request, watch=watch)
        return part.put_back(drawn)


@dataclass(frozen=True, slots=True)
class Part:
    """A part cut out of its picture: to be drawn, and to be put back."""

    request: GenerateRequest  # what draws it; its picture and mask are files that last as long as `refining`
    put_back: Callable[[Picture], Picture]  # what was drawn → the whole picture


@contextmanager
def refining(
    preset: Preset, picture: str, request: GenerateRequest, refinement: Refinement, *, denoise: float = DENOISE
) -> Iterator[Part]:
    """Cut the part out, for those who draw otherwise than by `generate`; arguments and errors are those of `refine`.

    Args:
        preset: of the model, for the size that it likes best.
    """
    if request.batch != 1 or request.image is not None or request.mask is not None or request.outpaint is not None:
        raise RequestError("A refinement draws one part of one picture: leave out batch, image, mask and outpaint.")
    opened = open_image(picture)
    whole = flat(upright(opened))
    size = request.width or preset.width, request.height or preset.height
    mask = shaped(_mask(whole, picture, refinement), 0, refinement.feather)
    prepared = prepare(whole, mask, size, only_masked=True, padding=refinement.context, hard=False)
    assert prepared.mask is not None
    with tempfile.TemporaryDirectory(prefix="octavo-refine-") as folder:
        part, marked = Path(folder) / "part.png", Path(folder) / "mask.png"
        prepared.image.save(part)
        prepared.mask.save(marked)
        asked = replace(
            request,
            image=str(part),
            mask=str(marked),
            denoise=denoise,
            width=size[0],
            height=size[1],
            controls=(*request.controls, *edges_of(str(part), refinement)),
        )

        def put_back(drawn: Picture) -> Picture:
            composed = prepared.compose(drawn.image)
            return Picture(composed, _settings(opened), _notes(opened, refinement, drawn.settings))

        yield Part(asked, put_back)


def edges_of(picture: str, refinement: Refinement) -> tuple[ControlImage, ...]:
    """What keeps the outlines of `picture`; nothing where that is not asked."""
    if not refinement.follow_edges:
        return ()
    return (ControlImage(image=picture, type="canny", preprocess="canny", strength=refinement.follow_edges),)


def check(picture: str, refinement: Refinement) -> None:
    """Whether the part is in the picture.

    Raises:
        RequestError: it is not, or a file cannot be read.
    """
    _mask(flat(upright(open_image(picture))), picture, refinement)


def _mask(whole: Image.Image, path: str, refinement: Refinement) -> Image.Image:
    """What is drawn anew, L and as large as the picture."""
    if refinement.mask is not None:
        return read_mask(refinement.mask, whole, path)
    assert refinement.region is not None
    x, y, width, height = refinement.region
    if min(x, y) < 0 or min(width, height) < SMALLEST or x + width > whole.width or y + height > whole.height:
        raise RequestError(
            f"The region {x},{y},{width},{height} is not inside {Path(path).name}, which is {whole.width}x"
            f"{whole.height}: give x, y, width and height in its pixels, sides of at least {SMALLEST}."
        )
    mask = Image.new("L", whole.size)
    ImageDraw.Draw(mask).rectangle((x, y, x + width - 1, y + height - 1), fill=255)
    return mask


def _settings(opened: Image.Image) -> dict[str, Any]:
    """What drew the whole picture, where it says so."""
    try:
        settings = json.loads(opened.info.get("octavo", ""))
    except (ValueError, TypeError):
        return {}
    return settings if isinstance(settings, dict) and "prompt" in settings else {}


def _notes(opened: Image.Image, refinement: Refinement, drawn: Mapping[str, Any]) -> dict[str, str]:
    """What other programs wrote, and what was refined: before, and now."""
    notes = {name: text for name in KEPT if isinstance(text := opened.info.get(name), str)}
    try:
        before = json.loads(opened.info.get(NOTE, "[]"))
    except (ValueError, TypeError):
        before = []
    part = {"region": refinement.region, "mask": refinement.mask and Path(refinement.mask).name}
    how = {"context": refinement.context, "feather": refinement.feather, "follow_edges": refinement.follow_edges}
    request = {name: value for name, value in drawn.items() if name not in ("image", "mask", "controls")}
    done = {name: value for name, value in (part | how).items() if value is not None} | {"request": request}
    return notes | {NOTE: json.dumps([*(before if isinstance(before, list) else []), done])}
