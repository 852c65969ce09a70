"""What may be asked for, checked once.

A `GenerateRequest` holds what the user gave, `None` where nothing was given. `resolve` lays it over a model's preset
and gives a `Job` without gaps, which is what the rest of the pipeline reads and what a picture carries.
"""

import secrets
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from octavo._version import __version__
from octavo.checkpoint.presets import Preset
from octavo.errors import RequestError
from octavo.pipeline.bounds import check_number, check_side
from octavo.pipeline.control_request import ControlImage
from octavo.pipeline.editing import check_editing, outpainted_size
from octavo.pipeline.hires import Hires
from octavo.pipeline.speed import EXACT, speed_called
from octavo.sampling import get_sampler, get_schedule
from octavo.sampling.guidance import SkipLayerGuidance
from octavo.text.lora_tags import split_tags

MAX_SEED = 2**64 - 1
MAX_STRENGTH = 100.0  # of a LoRA, either sign


@dataclass(frozen=True, slots=True)
class Lora:
    """A LoRA by its name, and how strongly it acts; 0 is not at all."""

    name: str
    strength: float = 1.0
    text_strength: float | None = None  # in the text encoders; None for the same

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip():
            raise RequestError("A LoRA has no name; say which file is meant.")
        for what, value in (("strength", self.strength), ("text strength", self.text_strength)):
            check_number(f"The {what} of the LoRA '{self.name}':", value, -MAX_STRENGTH, MAX_STRENGTH)

    @property
    def in_text(self) -> float:
        """How strongly it acts in the text encoders."""
        return self.strength if self.text_strength is None else self.text_strength

    @property
    def settings(self) -> dict[str, Any]:
        """Plain data for JSON, without what was not asked."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def _loras_in(prompt: str) -> tuple[Lora, ...]:
    """Those that a prompt asks for."""
    return tuple(Lora(tag.name, tag.strength, tag.text_strength) for tag in split_tags(prompt)[1])


def _loras_of(settings: Iterable[Mapping[str, Any]]) -> tuple[Lora, ...]:
    return tuple(Lora(**lora) for lora in settings)


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """One prompt and how to draw it. `None` asks for what suits the model."""

    prompt: str  # may ask for LoRAs, as <lora:name:0.8>; see `text.lora_tags`
    negative_prompt: str = ""
    loras: tuple[Lora, ...] = ()  # beside those
    controls: tuple[ControlImage, ...] = ()  # pictures to follow
    width: int | None = None  # pixels
    height: int | None = None  # pixels
    steps: int | None = None
    guidance_scale: float | None = None  # 1 means no guidance
    sampler: str | None = None
    schedule: str | None = None
    shift: float | None = None  # of the schedule; 3 for the released models
    seed: int | None = None  # of the first picture, the next ones count up; drawn when not given
    batch: int = 1  # pictures
    image: str | None = None  # path of a picture to start from
    mask: str | None = None  # path of a picture, white where `image` is drawn anew
    mask_grow: int = 0  # pixels of `image` by which the mask is made larger
    mask_feather: int | None = None  # pixels over which its edge is softened
    outpaint: tuple[int, int, int, int] | None = None  # pixels to add at left, top, right, bottom of `image`
    denoise: float = 1.0  # share of the schedule that is run; below 1 keeps some of `image`
    hires: Hires | None = None  # a second pass that makes it larger
    skip_layer_guidance: SkipLayerGuidance | None = None  # scale 0 switches it off
    guidance_rescale: float = 0.0  # how far guided predictions go back to the conditional one's contrast, 0 to 1
    guidance_start: float = 0.0  # fraction of the steps before which there is no guidance
    guidance_end: float = 1.0  # fraction of the steps after which there is no guidance
    speed: str | None = None  # exact, or closeness to it given for time: balanced, fast; see `pipeline.speed`
    clip_skip: int = 2  # which of CLIP's last layers is read
    model: str | None = None  # for the record: what drew it
    version: str = __version__

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise RequestError("The prompt is empty; say what the picture should show.")
        check_number("steps", self.steps, 1, 1000)
        check_number("guidance_scale", self.guidance_scale, 0, 100)
        check_number("shift", self.shift, 0.01, 100)
        check_number("seed", self.seed, 0, MAX_SEED)
        check_number("batch", self.batch, 1, 10_000)
        check_number("denoise", self.denoise, 0, 1)
        check_number("guidance_rescale", self.guidance_rescale, 0, 1)
        check_number("clip_skip", self.clip_skip, 1, 32)
        if split_tags(self.negative_prompt)[1]:
            raise RequestError("A LoRA acts on the whole picture: ask for it in the prompt, not in the negative one.")
        if not 0 <= self.guidance_start < self.guidance_end <= 1:
            raise RequestError(
                f"guidance from {self.guidance_start} to {self.guidance_end}: need 0 <= start < end <= 1."
            )
        if self.speed is not None:
            speed_called(self.speed)
        for side in ("width", "height"):
            check_side(side, getattr(self, side))
        check_editing(self)
        if self.image is None and self.mask is not None:
            raise RequestError(f"mask {self.mask} marks a part of a picture, but no picture is given; pass --image.")
        if self.image is not None and self.hires is not None:
            raise RequestError(
                "Hires draws from words, makes the picture larger and draws it again; here a picture to start from is "
                "given. Leave one out: --image with a larger --size and --denoise 0.5 is the second pass alone."
            )
        self._check_start()

    def _check_start(self) -> None:
        if self.image is None and self.denoise < 1:
            raise RequestError(f"denoise {self.denoise} keeps part of a picture, but none is given; pass --image.")

    @property
    def words(self) -> str:
        """The prompt without the LoRAs that it asks for."""
        return split_tags(self.prompt)[0]

    @property
    def all_loras(self) -> tuple[Lora, ...]:
        """The LoRAs that are asked for, in the prompt and beside it.

        Raises:
            RequestError: the prompt asks for one in a way that makes no sense.
        """
        return (*self.loras, *_loras_in(self.prompt))

    @property
    def hires_loras(self) -> tuple[Lora, ...]:
        """Those of the second pass; none where there is no such pass.

        Raises:
            RequestError: as `all_loras`.
        """
        if self.hires is None:
            return ()
        beside = self.loras if self.hires.loras is None else self.hires.loras
        return (*beside, *_loras_in(self.hires.prompt or self.prompt))

    @property
    def settings(self) -> dict[str, Any]:
        """Plain data for JSON, without what was not asked; `from_settings` reads it back."""
        plain = {key: value for key, value in asdict(self).items() if value not in (None, ())}
        if self.loras:
            plain["loras"] = [lora.settings for lora in self.loras]
        if self.controls:
            plain["controls"] = [control.settings for control in self.controls]
        if self.hires is not None:
            plain["hires"] = self.hires.settings
        return plain

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> "GenerateRequest":
        """The request that a picture carries.

        Raises:
            RequestError: a value of the wrong kind. Names that this version does not know are refused too, for a
                picture repeated without them would be another picture.
        """
        values = dict(settings)
        unknown = values.keys() - {field.name for field in fields(cls)}
        if unknown:
            raise RequestError(
                f"The settings ask for {', '.join(sorted(unknown))}, which this version of Octavo ({__version__}) does "
                f"not know; they were written by version {values.get('version', 'unknown')}."
            )
        try:
            guidance = values.get("skip_layer_guidance")
            if guidance is not None:
                values["skip_layer_guidance"] = SkipLayerGuidance(**{**guidance, "layers": tuple(guidance["layers"])})
            if "loras" in values:
                values["loras"] = _loras_of(values["loras"])
            if values.get("outpaint") is not None:
                values["outpaint"] = tuple(values["outpaint"])
            if "controls" in values:
                values["controls"] = tuple(ControlImage(**control) for control in values["controls"])
            if values.get("hires") is not None:
                values["hires"] = hires_of(values["hires"])
            return cls(**values)
        except (TypeError, KeyError, AttributeError) as error:
            raise RequestError(f"The settings cannot be read: {error}.") from error


def hires_of(settings: Mapping[str, Any]) -> Hires:
    """What `Hires.settings` gave.

    Raises:
        RequestError: it makes no sense.
        TypeError: names or values of another kind.
    """
    values = {**settings}
    if values.get("loras") is not None:
        values["loras"] = _loras_of(values["loras"])
    return Hires(**values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job(GenerateRequest):
    """A request without gaps: every setting that a picture depends on has its value."""

    width: int
    height: int
    steps: int
    guidance_scale: float
    sampler: str
    schedule: str
    shift: float
    seed: int
    speed: str
    model: str

    def _check_start(self) -> None:
        """It has been checked where it was asked; a second pass starts from the first one's latents, and no picture."""

    @property
    def passes(self) -> "tuple[Job, ...]":
        """What is drawn one after the other, each a job without `hires`: itself or, with it, the small one first."""
        again = self.hires
        if again is None:
            return (self,)
        width, height = again.size(self.width, self.height)
        second = replace(
            self,
            hires=None,
            width=width,
            height=height,
            denoise=again.denoise,
            steps=again.steps or self.steps,
            guidance_scale=self.guidance_scale if again.guidance_scale is None else again.guidance_scale,
            sampler=again.sampler or self.sampler,
            schedule=again.schedule or self.schedule,
            prompt=again.prompt or self.prompt,
            negative_prompt=self.negative_prompt if again.negative_prompt is None else again.negative_prompt,
            loras=self.loras if again.loras is None else again.loras,
        )
        return (replace(self, hires=None), second)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels of the finished picture."""
        last = self.passes[-1]
        return last.width, last.height


def resolve(request: GenerateRequest, preset: Preset, *, model: str, max_side: int) -> Job:
    """The request with the model's own settings wherever nothing was asked.

    Args:
        request: as the user gave it.
        preset: of the model.
        model: its name, for the record.
        max_side: longest side that the model's table of positions covers, in pixels.

    Raises:
        RequestError: an unknown sampler or schedule, or a size beyond the model.
    """
    width, height = request.width or preset.width, request.height or preset.height
    if request.outpaint is not None and request.image is not None:
        whole = outpainted_size(request.image, request.outpaint)
        if (request.width or whole[0], request.height or whole[1]) != whole:
            raise RequestError(f"The outpainted picture has {whole[0]}x{whole[1]} pixels; leave the size out.")
        width, height = whole
    filled = {
        "prompt": request.words,
        "loras": request.all_loras,
        "width": width,
        "height": height,
        "steps": request.steps or preset.steps,
        "guidance_scale": preset.guidance_scale if request.guidance_scale is None else request.guidance_scale,
        "sampler": get_sampler(request.sampler or preset.sampler).name,
        "schedule": get_schedule(request.schedule or preset.schedule).__name__,
        "shift": request.shift or preset.shift,
        "seed": secrets.randbelow(2**32) if request.seed is None else request.seed,
        "skip_layer_guidance": request.skip_layer_guidance or preset.skip_layer_guidance,
        "speed": request.speed or EXACT.name,
        "hires": _resolved_hires(request, width, height),
        "model": model,
        "version": __version__,
    }
    job = Job(**{field.name: getattr(request, field.name) for field in fields(request)} | filled)
    for each in job.passes:
        if max(each.width, each.height) > max_side:
            raise RequestError(
                f"{each.width}x{each.height} is too large: this model knows positions up to {max_side} pixels a side."
            )
    if job.seed + job.batch - 1 > MAX_SEED:
        raise RequestError(f"seed {job.seed} leaves no room for {job.batch} pictures below 2^64.")
    return job


def _resolved_hires(request: GenerateRequest, width: int, height: int) -> Hires | None:
    """The second pass with its size and proper names; what it has as the first pass does stays unsaid."""
    again, loras = request.hires, request.hires_loras
    if again is None:
        return None
    across, down = again.size(width, height)
    return replace(
        again,
        scale=None,
        width=across,
        height=down,
        sampler=again.sampler and get_sampler(again.sampler).name,
        schedule=again.schedule and get_schedule(again.schedule).__name__,
        prompt=again.prompt and split_tags(again.prompt)[0],
        loras=None if loras == request.all_loras else loras,
    )
