"""What Octavo's users add to OpenAI's API for a picture: ControlNets and LoRAs, as `extra_body` of OpenAI's client."""

import asyncio
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from octavo.server import pictures
from octavo.server.fields import ControlSettings
from octavo.server.limits import from_base64, open_picture
from octavo.server.problems import Refused
from octavo.server.state import State

if TYPE_CHECKING:
    from octavo.pipeline.control_request import ControlImage
    from octavo.pipeline.request import GenerateRequest

MOST_CONTROLS, MOST_LORAS = 4, 16


class ControlField(ControlSettings):
    """A picture to follow."""

    image: str | None = Field(None, description="in base64, or as a data: URL; of an edit its own picture if left out")


class LoraField(BaseModel):
    """A LoRA and how strongly it acts."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(max_length=1000)
    strength: float = Field(1.0, ge=-100, le=100)
    text_strength: float | None = Field(None, ge=-100, le=100, description="in the text encoders; else the same")


def listed(value: Any) -> Any:
    """A list as JSON bodies have it; forms, where all is text, have it as JSON in one field."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise ValueError("write it as JSON, such as json.dumps([…])") from None


def own_wishes(
    controls: Sequence[ControlField], loras: Sequence[LoraField], state: State, image: str | None
) -> dict[str, Any]:
    """The fields of `GenerateRequest`; pictures are kept for the job.

    Args:
        image: path of the edited picture.

    Raises:
        Refused: a control has no picture, or one that is none.
        RequestError: a control makes no sense.
    """
    from octavo.pipeline.request import Lora

    found: dict[str, Any] = {}
    if controls:
        found["controls"] = tuple(_control(each, i, state, image) for i, each in enumerate(controls))
    if loras:
        found["loras"] = tuple(Lora(**each.model_dump()) for each in loras)
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
