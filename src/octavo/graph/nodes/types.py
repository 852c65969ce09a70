"""What travels on the links between nodes: one type for each of ComfyUI's words.

    MODEL         ModelLink                    GUIDER    Guider
    CLIP          pipeline.shelf.Clip          NOISE     Noise
    VAE           pipeline.shelf.Vae           SAMPLER   sampling.SamplerSpec
    CONDITIONING  Conditions                   SIGMAS    Sigmas
    LATENT        Latent                       IMAGE     Tensor [B, H, W, 3] in [0, 1]
    CONTROL_NET   Part[ControlNet]             MASK      Tensor [B, H, W] in [0, 1]

Tensors on links are float32 on the CPU, conditioning aside. Nothing on a link is ever changed: a node that edits what
it was given makes a new one.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NotRequired, TypedDict, TypeVar

from torch import Tensor

from octavo.errors import RequestError
from octavo.sampling import SkipLayerGuidance

if TYPE_CHECKING:
    from octavo.models.adapter import Applied
    from octavo.pipeline.conditions import Condition
    from octavo.pipeline.shelf import Model

Conditions = tuple["Condition", ...]
"""Texts with where, when and how strongly each holds; what ComfyUI calls a conditioning."""

Sigmas = tuple[float, ...]
"""Noise levels as ComfyUI's nodes hand them on: usually falling to 0, but whatever a node made of them."""

Given = TypeVar("Given")


class Latent(TypedDict):
    """Latents as ComfyUI's nodes hand them on: in the numbers of the VAE, before they are shifted and scaled."""

    samples: Tensor  # [B, C, h, w]; C is 16, or anything while all values are 0
    noise_mask: NotRequired[Tensor]  # [1 or B, 1, H, W] of any size, 1 = draw anew
    batch_index: NotRequired[list[int]]  # of each row: which picture of its seed it is


@dataclass(frozen=True, slots=True, kw_only=True)
class SkipLayers:
    """Skip-layer guidance, and the shift by which its start and end were meant."""

    guidance: SkipLayerGuidance
    shift: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLink:
    """A diffusion model with the edits that nodes made to how it is sampled from."""

    model: "Model"
    shift: float  # of its schedule
    rescale: float = 0.0  # see `sampling.ClassifierFree`
    skip_layers: SkipLayers | None = None
    adapters: "Applied" = ()  # LoRAs

    @classmethod
    def of(cls, model: "Model") -> "ModelLink":
        """The model as it is loaded."""
        return cls(model=model, shift=model.preset.shift)

    def edited(self, **changes: object) -> "ModelLink":
        """The same model with other edits."""
        return replace(self, **changes)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True, kw_only=True)
class Guider:
    """A model, what it is told, and how strongly."""

    model: ModelLink
    positive: Conditions
    negative: Conditions | None  # None: there is none, and no guidance
    scale: float  # 1 means no guidance


@dataclass(frozen=True, slots=True, kw_only=True)
class Noise:
    """What a run starts from, and the seed of what it draws on its way."""

    seed: int
    silent: bool = False  # start without noise


def given(value: Given | None, what: str, remedy: str) -> Given:
    """`value`, which a link may lack: a loader gives nothing for parts that its file does not hold.

    Raises:
        RequestError: there is nothing; says what is missing and what to do.
    """
    if value is None:
        raise RequestError(f"There is no {what} on this link: {remedy}")
    return value
