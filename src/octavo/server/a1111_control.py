"""ControlNet as AUTOMATIC1111's clients ask for it: the units of its extension, in `alwayson_scripts`.

A unit's picture is fitted as `octavo generate --control` does it; `module` canny finds its edges, `none` takes it as it
is. Edges are found at the size that is drawn, whatever `processor_res` says. What Octavo does otherwise is refused.

Source: the API of Mikubill's sd-webui-controlnet.
"""

import asyncio
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, FastAPI
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from octavo.server import pictures
from octavo.server.limits import from_base64, open_picture
from octavo.server.problems import Refused
from octavo.server.state import State, TheState

if TYPE_CHECKING:
    from octavo.pipeline.control_request import ControlImage

router = APIRouter(prefix="/controlnet", tags=["AUTOMATIC1111"])

FIELD = "alwayson_scripts"
NAMES = ("controlnet", "control net")  # of the script, in any case
MODULES = ("none", "canny")
MOST_UNITS = 4
SAME_SHAPE = 0.01  # by how much proportions may differ for all resize modes to be alike
# Of the extension's choices, those that say what is done here.
BALANCED = (None, 0, "0", "Balanced", "ControlMode.BALANCED")
CUT = (None, 1, "1", "Crop and Resize", "ResizeMode.INNER_FIT", "Inner Fit (Scale to Fit)", "Scale to Fit (Inner Fit)")


class Unit(BaseModel):
    """One ControlNet and its picture, as the extension's clients send them."""

    model_config = ConfigDict(extra="ignore")  # the extension has dozens of fields of its own page

    enabled: bool = True
    module: str | None = "none"
    model: str | None = None
    image: str | dict[str, Any] | None = None
    input_image: str | None = None  # its older name
    weight: float = Field(1.0, ge=0, le=10)
    guidance_start: float = Field(0.0, ge=0, le=1)
    guidance_end: float = Field(1.0, ge=0, le=1)
    threshold_a: float | None = None  # of edges, on the scale of 0 to 255; the lower
    threshold_b: float | None = None
    control_mode: int | str | None = None
    resize_mode: int | str | None = None
    mask: str | None = None
    effective_region_mask: str | None = None

    @property
    def picture(self) -> str | None:
        """Its picture in base64."""
        given = self.image.get("image") if isinstance(self.image, Mapping) else self.image
        return given or self.input_image


def is_control(script: str) -> bool:
    """Whether a script of this name is the extension's."""
    return script.strip().lower() in NAMES


async def controls_of(
    scripts: Mapping[str, Any], state: State, start: str | None, size: tuple[int, int]
) -> "tuple[ControlImage, ...] | None":
    """What the units in `alwayson_scripts` come to; None without any.

    Args:
        size: width and height of what is drawn.
        start: path of the picture to start from, which a unit without a picture of its own follows.

    Raises:
        Refused: 422, for what is not done here.
        RequestError: a picture that cannot be read, or a number out of range.
    """
    units = [unit for name, script in scripts.items() if is_control(name) for unit in _units(script)]
    if len(units) > MOST_UNITS:
        raise _not_done(f"{len(units)} ControlNet units are asked for; {MOST_UNITS} are the most.")
    works = await state.until_started() if units else None
    names = [] if works is None else await asyncio.to_thread(works.shelf.names, "controlnet")
    return tuple([await asyncio.to_thread(_control, unit, names, state, start, size) for unit in units]) or None


def _units(script: Any) -> list[Unit]:
    args = script.get("args") if isinstance(script, Mapping) else None
    if not isinstance(args, list):
        raise _not_done(f"{FIELD}: ControlNet needs 'args', a list of units.")
    try:
        units = [Unit.model_validate(each) for each in args if isinstance(each, Mapping)]
    except ValidationError as error:
        first = error.errors()[0]
        raise _not_done(f"{FIELD}: ControlNet's {'.'.join(map(str, first['loc']))}: {first['msg']}.") from error
    return [unit for unit in units if unit.enabled]


def _control(unit: Unit, names: list[str], state: State, start: str | None, size: tuple[int, int]) -> "ControlImage":
    from octavo.pipeline.control_request import ControlImage

    module = (unit.module or "none").lower()
    if module not in MODULES:
        raise _not_done(
            f"{FIELD}: there is no preprocessor '{unit.module:.60}'; /controlnet/module_list names {MODULES}."
        )
    if unit.control_mode not in BALANCED:
        raise _not_done(f"{FIELD}: control_mode {unit.control_mode!r:.40} is not done by Octavo; use 'Balanced'.")
    if unit.mask or unit.effective_region_mask:
        raise _not_done(f"{FIELD}: masks of ControlNet units are not done by Octavo; leave them out.")
    model = None if unit.model in (None, "", "None") else _named(str(unit.model), names)
    if model is None and module == "none":
        raise _not_done(f"{FIELD}: a ControlNet unit names neither model nor preprocessor.")
    path = start
    if unit.picture is not None:
        data = from_base64(unit.picture, field=FIELD)
        picture = open_picture(data, max_pixels=state.settings.max_upload_pixels, field=FIELD)
        if unit.resize_mode not in CUT and abs(picture.width * size[1] / (picture.height * size[0]) - 1) > SAME_SHAPE:
            raise _not_done(
                f"{FIELD}: a control picture of {picture.width}x{picture.height} does not have the proportions of "
                f"{size[0]}x{size[1]}, and of the resize modes only 'Crop and Resize' is done by Octavo."
            )
        path = pictures.keep_upload(picture, state.settings.uploads)
    if path is None:
        raise _not_done(f"{FIELD}: a ControlNet unit has no image, and there is none to start from.")
    canny = module == "canny"
    # The page of the extension sends -1, or 64, for the thresholds of preprocessors that have none.
    low, high = unit.threshold_a, unit.threshold_b
    return ControlImage(
        image=path,
        type="canny" if canny else None,
        model=model,
        strength=unit.weight,
        start=unit.guidance_start,
        end=unit.guidance_end,
        preprocess="canny" if canny else None,
        low=100 / 255 if not canny or low is None or low <= 0 else low / 255,
        high=200 / 255 if not canny or high is None or high <= 0 else high / 255,
    )


def _named(model: str, names: list[str]) -> str:
    """The file that the extension's clients call `name` or `name [hash]`."""
    wanted = re.sub(r"\s*\[[^\]]*\]$", "", model).casefold()
    for name in names:
        if wanted in (name.casefold(), Path(name).stem.casefold()):
            return name
    raise Refused(
        f"There is no ControlNet '{model[:100]}'. /controlnet/model_list names those that are there.",
        status=404,
        kind="model_not_found",
        param=FIELD,
    )


def _not_done(text: str) -> Refused:
    return Refused(text, status=422, kind="not_supported", param=FIELD)


@router.get("/version")
async def version() -> dict[str, int]:
    """Of the extension's API."""
    return {"version": 3}


@router.get("/model_list")
async def model_list(state: TheState) -> dict[str, list[str]]:
    """ControlNet files that are there."""
    works = await state.until_started()
    names = await asyncio.to_thread(works.shelf.names, "controlnet")
    return {"model_list": [Path(name).stem for name in names]}


@router.get("/module_list")
async def module_list() -> dict[str, Any]:
    """What is made of pictures before they are followed."""
    slider = {"min": 1, "max": 255, "step": 1}
    sliders = [{"name": "Low Threshold", "value": 100, **slider}, {"name": "High Threshold", "value": 200, **slider}]
    detail = {"none": {"model_free": False, "sliders": []}, "canny": {"model_free": False, "sliders": sliders}}
    return {"module_list": list(MODULES), "module_detail": detail}


def install(app: FastAPI) -> None:
    """Add the routes."""
    app.include_router(router)
