"""Fields that requests of several of our doors have in common."""

from pydantic import BaseModel, ConfigDict, Field

MOST_LORAS = 16


class LoraSettings(BaseModel):
    """A LoRA and how strongly it acts."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(max_length=1000)
    strength: float = Field(1.0, ge=-100, le=100)
    text_strength: float | None = Field(None, ge=-100, le=100, description="in the text encoders; else the same")


class ControlSettings(BaseModel):
    """How a ControlNet acts; the picture that it follows is named in each door's own way."""

    model_config = ConfigDict(extra="forbid")

    type: str | None = Field(None, description="what it shows: blur, canny or depth; by this the ControlNet is found")
    model: str | None = Field(None, max_length=1000, description="or the ControlNet's file")
    strength: float = Field(1.0, ge=0, le=10)
    start: float = Field(0.0, ge=0, le=1, description="fraction of the schedule from which on it acts")
    end: float = Field(1.0, ge=0, le=1)
    preprocess: str | None = Field(None, description="canny finds the edges of a photo first")
    low: float = Field(0.4, gt=0, lt=4, description="thresholds of edges")
    high: float = Field(0.8, gt=0, lt=4)
    invert: bool = False


class HiresSettings(BaseModel):
    """A second, larger pass; what is left out is as in the first one."""

    model_config = ConfigDict(extra="forbid")

    scale: float | None = Field(None, ge=1, le=8, description="of both sides; 2 where no size is given either")
    width: int | None = Field(None, description="or pixels; a side that is left out follows from the other")
    height: int | None = None
    method: str | None = Field(
        None,
        max_length=100,
        description="how it is made larger: lanczos, bicubic, bilinear, area, nearest-exact; as latents with latent- "
        "before it, or latent-bislerp",
    )
    denoise: float | None = Field(None, ge=0, le=1, description="how much is made anew")
    steps: int | None = Field(None, ge=1, le=1000)
    guidance_scale: float | None = Field(None, ge=0, le=100)
    sampler: str | None = None
    schedule: str | None = None
    prompt: str | None = Field(None, max_length=20_000)
    negative_prompt: str | None = Field(None, max_length=20_000)
    loras: list[LoraSettings] | None = Field(None, max_length=MOST_LORAS)

    @property
    def said(self) -> dict[str, object]:
        """What is not left out, as `GenerateRequest.settings` has it."""
        return self.model_dump(exclude_none=True)
