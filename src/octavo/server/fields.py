"""Fields that requests of several of our doors have in common."""

from pydantic import BaseModel, ConfigDict, Field


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
