"""What may be asked of ControlNets: a picture to follow, by which net, how strongly, from when to when."""

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from octavo.errors import RequestError, did_you_mean
from octavo.pipeline.control import check_strength

ControlType = Literal["blur", "canny", "depth"]
TYPES: tuple[str, ...] = get_args(ControlType)
FORMS = (
    "Write canny:photo.png, depth:depth.png or blur:blurred.png, or model=file,image=picture.png with any of "
    "type=canny, strength=0.8, start=0, end=0.6, preprocess=canny, low=0.4, high=0.8, invert=yes"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlImage:
    """A picture to follow; it is scaled and cropped around its middle to the size that is drawn."""

    image: str  # path of a picture
    type: ControlType | None = None  # what it shows; by this the net is found
    model: str | None = None  # name of the net's file, where it is not to be found by its type
    strength: float = 1.0  # 0 to 10
    start: float = 0.0  # fraction of the training timesteps, from pure noise
    end: float = 1.0  # likewise
    preprocess: Literal["canny"] | None = None  # find the edges of a photo first; else it is followed as it is
    low: float = 0.4  # thresholds of the edges, see `edges.canny`
    high: float = 0.8
    invert: bool = False  # for depth pictures whose near is dark

    def __post_init__(self) -> None:
        if not self.image:
            raise RequestError(f"A control has no picture. {FORMS}.")
        if self.type is None and self.model is None:
            raise RequestError(f"The control picture '{self.image}' says neither type nor model. {FORMS}.")
        if self.type is not None and self.type not in TYPES:
            raise RequestError(
                f"There is no control of type '{self.type}'. Use {', '.join(TYPES)}.{did_you_mean(self.type, TYPES)}"
            )
        if self.preprocess not in (None, "canny"):
            raise RequestError(f"preprocess '{self.preprocess}': only canny is made of photos here.")
        check_strength(self.strength, self.called)
        for name in ("start", "end", "low", "high"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise RequestError(f"{name} {value!r} of the ControlNet '{self.called}': need a number.")
        if not 0 <= self.start < self.end <= 1:
            raise RequestError(
                f"The ControlNet '{self.called}' from {self.start} to {self.end}: need 0 <= start < end <= 1."
            )
        if not 0 < self.low <= self.high < 4:
            raise RequestError(f"Thresholds of edges {self.low} and {self.high}: need 0 < low <= high < 4.")
        if not isinstance(self.invert, bool):
            raise RequestError(f"invert {self.invert!r} of the ControlNet '{self.called}': need true or false.")

    @property
    def called(self) -> str:
        """What people call it."""
        return self.model or self.type or "?"

    @property
    def settings(self) -> dict[str, Any]:
        """Plain data for JSON, without what is as it would be unsaid."""
        unsaid = {name: field.default for name, field in self.__dataclass_fields__.items()}
        return {name: value for name, value in asdict(self).items() if value != unsaid[name]}


def control_called(text: str, **given: float | None) -> ControlImage:
    """A control as commands write it: `canny:photo.png`, or `model=file,image=picture.png,strength=0.8`.

    Args:
        given: strength, start and end for what the text leaves unsaid.

    Raises:
        RequestError: it cannot be understood.
    """
    values: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    kind, colon, image = text.partition(":")
    if colon and kind in TYPES:
        values |= {"type": kind, "image": image}
        if kind == "canny":
            values["preprocess"] = "canny"
        return ControlImage(**values)
    if "=" not in text:
        if colon and len(kind) > 1:
            raise RequestError(f"--control {text}: there is no control '{kind}'.{did_you_mean(kind, TYPES)} {FORMS}.")
        raise RequestError(f"--control {text} cannot be understood. {FORMS}.")
    for piece in text.split(","):
        name, _, value = (part.strip() for part in piece.partition("="))
        if name not in ControlImage.__dataclass_fields__:
            near = did_you_mean(name, ControlImage.__dataclass_fields__)
            raise RequestError(f"--control {text}: '{name}' is no setting of a control.{near} {FORMS}.")
        values[name] = _read(name, value)
    return ControlImage(**{"image": ""} | values)


def _read(name: str, value: str) -> object:
    if name == "invert":
        if value not in ("yes", "no"):
            raise RequestError(f"invert={value}: write yes or no.")
        return value == "yes"
    if name in ("strength", "start", "end", "low", "high"):
        try:
            return float(value)
        except ValueError:
            raise RequestError(f"{name}={value}: write a number.") from None
    return value
