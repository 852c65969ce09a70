"""What Octavo's users add to OpenAI's API for a picture, as `extra_body`: ControlNets, LoRAs, a second pass."""

import asyncio
import json
from typing import TYPE_CHECKING, Any

from pydantic import Field

from octavo.server import pictures
from octavo.server.fields import ControlSettings
from octavo.server.limits import from_base64, open_picture
from octavo.server.problems import Refused
from octavo.server.state import State

if TYPE_CHECKING:
    from octavo.pipeline.control_request import ControlImage
    from octavo.pipeline.request import GenerateRequest
    from octavo.server.openai_fields import Images

MOST_CONTROLS = 4


class ControlField(ControlSettings):
    """A picture to follow."""

    image: str | None = Field(None, description="in base64, or as a data: URL; of an edit its own picture if left out")


def as_json(value: Any) -> Any:
    """A list or an object as JSON bodies have it; forms, where all is text, have it as JSON in one field."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise ValueError("write it as JSON, by json.dumps(…)") from None


def own_wishes(body: "Images", state: State, image: str | None) -> dict[str, Any]:
    """The fields of `GenerateRequest`; pictures are kept for the job.

    Args:
        image: path of the edited picture.

    Raises:
        Refused: a control has no picture, or one that is none.
        RequestError: a control or the second pass makes no sense.
    """
    from octavo.pipeline.request import Lora, hires_of

    found: dict[str, Any] = {}
    if body.controls:
        found["controls"] = tuple(_control(each, i, state, image) for i, each in enumerate(body.controls))
    if body.loras:
        found["loras"] = tuple(Lora(**each.model_dump()) for each in body.loras)
    if body.hires is not None:
        found["hires"] = hires_of(body.hires.said)
    return found


def _control(field: ControlField, index: int, state: State, image: str | None) -> "ControlImage":
    from octavo.pipeline.control_request import ControlImage

    name, path = f"controls[{index}].image", image
    if field.image is not None:
        data = from_base64(field.image, field=name)
        opened = open_picture(data, max_pixels=state.settings.max_upload_pixels, field=name)
        path = pictures.keep_upload(opened, state.settings.uploads)
    if path is None:
        raise Refused(f"{name}: send the picture to follow, in base64.", kind="invalid_value", param="controls")
    return ControlImage(**field.model_dump(exclude={"image"}) | {"image": path})


async def check_controls(state: State, model: str | None, request: "GenerateRequest") -> None:
    """Refuse ControlNets that are not there or do not suit the model, before the request waits in line.

    Raises:
        ModelNotFoundError, CheckpointError, RequestError: as `Components.controls`.
    """
    if not request.controls:
        return
    works = await state.until_started()

    def look() -> None:
        components = works.shelf.components(model)
        size = request.width or components.preset.width, request.height or components.preset.height
        components.controls(request.controls, *size)

    await asyncio.to_thread(look)
