"""What OpenAI's image clients send, and what it means for us. What is not honoured is refused by name."""

import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from octavo.errors import RequestError
from octavo.pipeline.bounds import nearest_side
from octavo.server.fields import MOST_LORAS, HiresSettings, LoraSettings
from octavo.server.openai_own import MOST_CONTROLS, ControlField, as_json
from octavo.server.problems import Refused

SIZE = re.compile(r"([1-9]\d{1,4})x([1-9]\d{1,4})")
# More or fewer steps than suit the model.
STEPS: Mapping[str, float] = {"low": 0.5, "high": 1.5, "hd": 1.5, "xhigh": 2.0, "max": 2.0}
SHOWN_QUALITY: Mapping[str, str] = {"auto": "medium", "standard": "medium", "hd": "high"}
# How much of a picture is made anew, where no mask says so.
DENOISE: Mapping[str, float] = {"low": 0.75, "high": 0.5}


class Images(BaseModel):
    """What generations and edits have in common."""

    model_config = ConfigDict(extra="forbid")

    prompt: str = Field(max_length=20_000)
    model: str | None = Field(None, description="as /v1/models names it; the server's own if left out")
    n: int | None = Field(None, ge=1, le=10)
    size: str | None = Field(None, description="auto, or width x height in multiples of 16, such as 1024x768")
    quality: Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"] | None = Field(
        None, description="changes the number of steps: low half, high one and a half, xhigh and max twice"
    )
    output_format: Literal["png", "jpeg", "webp"] | None = None
    output_compression: int | None = Field(None, ge=0, le=100, description="quality of JPEG and WebP")
    response_format: Literal["b64_json", "url"] | None = None
    stream: bool | None = None
    partial_images: int | None = Field(None, ge=0, le=3)
    background: Literal["auto", "opaque"] | None = Field(None, description="pictures have no transparency")
    moderation: Literal["auto", "low"] | None = Field(None, description="there is none")
    user: str | None = Field(None, max_length=500)
    safety_identifier: str | None = Field(None, max_length=500)

    # Octavo's own, for `extra_body`
    negative_prompt: str | None = Field(None, max_length=20_000)
    seed: int | None = Field(None, ge=0, lt=2**64)
    steps: int | None = Field(None, ge=1, le=1000)
    guidance_scale: float | None = Field(None, ge=0, le=100)
    sampler: str | None = None
    schedule: str | None = None
    speed: Literal["exact", "balanced", "fast"] | None = Field(
        None, description="how many evaluations of the model are forecast instead of made; the server's own if left out"
    )
    controls: list[ControlField] = Field([], max_length=MOST_CONTROLS, description="pictures to follow")
    loras: list[LoraSettings] = Field([], max_length=MOST_LORAS, description="beside those that the prompt names")
    hires: HiresSettings | None = Field(None, description="draw it again, larger; not of edits")

    @field_validator("controls", "loras", "hires", mode="before")
    @classmethod
    def _as_json(cls, value: Any) -> Any:
        return as_json(value)

    @property
    def form(self) -> str:
        """Of the files: png, jpeg or webp."""
        return self.output_format or "png"

    @property
    def shown_quality(self) -> str:
        """The quality as answers name it."""
        return SHOWN_QUALITY.get(self.quality or "auto", self.quality or "medium")


class Edits(Images):
    """Of an edit, beside the pictures."""

    input_fidelity: Literal["high", "low"] | None = Field(None, description="how close an edit without mask stays")
    denoise: float | None = Field(None, ge=0, le=1, description="Octavo's own: how much is made anew")


def check(body: Images) -> None:
    """Refuse combinations that make no sense.

    Raises:
        Refused: 400, with the field's name.
    """

    def no(field: str, why: str) -> Refused:
        return Refused(f"{field}: {why}", kind="invalid_value", param=field)

    if not body.prompt.strip():
        raise no("prompt", "say what the picture should show.")
    if body.form == "png" and body.output_compression not in (None, 100):
        raise no("output_compression", "PNG is without loss; ask for jpeg or webp.")
    if body.response_format == "url" and body.stream:
        raise no("response_format", "a stream carries the pictures themselves; leave it out.")
    if body.response_format == "url" and body.output_compression is not None:
        raise no("output_compression", "only with b64_json.")
    if body.partial_images and not body.stream:
        raise no("partial_images", "only with stream.")


def size_of(text: str | None) -> tuple[int, int] | None:
    """Width and height in pixels; None for what suits the model.

    Raises:
        RequestError: it makes no sense.
    """
    if text is None or text.strip().lower() in ("", "auto"):
        return None
    found = SIZE.fullmatch(text.strip().lower())
    if found is None:
        raise RequestError(f"size '{text[:30]}': write auto, or width x height in pixels such as 1024x1024.")
    width, height = int(found[1]), int(found[2])
    if width % 16 or height % 16:
        near = "x".join(str(nearest_side(side)) for side in (width, height))
        raise RequestError(f"size {text}: the model needs multiples of 16, such as {near}.")
    return width, height


def steps_of(body: Images, usual: int) -> int | None:
    """Steps, as asked or by the quality; None for what suits the model."""
    times = STEPS.get(body.quality or "auto")
    if body.steps is not None or times is None:
        return body.steps
    return min(1000, max(1, round(usual * times)))


def edits_of(fields: Mapping[str, Any]) -> Edits:
    """An edit's fields from a form, where all are text.

    Raises:
        Refused: 400; a field is missing, unknown or makes no sense.
    """
    try:
        return Edits.model_validate(dict(fields))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise Refused(f"{where}: {first['msg']}.", kind="invalid_value", param=where) from None
