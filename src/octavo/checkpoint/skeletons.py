"""Released models without files: their parts on the meta device, in 16 bits or in FP8, to plan for what is not here."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from octavo.checkpoint.force import forced_specs
from octavo.checkpoint.kinds import Kind
from octavo.checkpoint.presets import LARGE, LARGE_TURBO, MEDIUM, SD3_MEDIUM, Preset
from octavo.errors import RequestError, did_you_mean
from octavo.models import VAE, ClipConfig, ClipTextEncoder, MMDiT, MMDiTConfig, T5Config, T5Encoder, VAEConfig
from octavo.quantize import convert

Format = Literal["fp8", "bf16"]


@dataclass(frozen=True, slots=True)
class Released:
    """A released model."""

    config: MMDiTConfig
    preset: Preset


RELEASED: Mapping[str, Released] = {
    "large": Released(MMDiTConfig.large(), LARGE),
    "turbo": Released(MMDiTConfig.large(), LARGE_TURBO),
    "medium": Released(MMDiTConfig.medium(), MEDIUM),
    "sd3-medium": Released(MMDiTConfig.sd3_medium(), SD3_MEDIUM),
}


def released(name: str) -> Released:
    """The model of this name.

    Raises:
        RequestError: there is none.
    """
    if name not in RELEASED:
        raise RequestError(
            f"No released model is called '{name}'. Use {', '.join(RELEASED)}.{did_you_mean(name, RELEASED)}"
        )
    return RELEASED[name]


def skeleton(kind: Kind, fmt: Format, config: MMDiTConfig | None = None) -> nn.Module:
    """One part on the meta device.

    Args:
        kind: clip_l, clip_g, t5 and vae are the same for all released models.
        fmt: "fp8" as `--force-fp8` makes it, the VAE left in 16 bits.
        config: of an mmdit; SD3.5 Large's where none is given.
    """
    with torch.device("meta"):
        model: nn.Module
        match kind:
            case "clip_l":
                model = ClipTextEncoder(ClipConfig.clip_l())
            case "clip_g":
                model = ClipTextEncoder(ClipConfig.clip_g())
            case "t5":
                model = T5Encoder(T5Config.xxl())
            case "vae":
                model = VAE(VAEConfig())
            case "mmdit":
                model = MMDiT(config or MMDiTConfig.large())
            case _:
                raise RequestError(f"There is no released {kind} without a file.")
    if fmt == "fp8" and kind != "vae":
        in_fp8(model, kind)
    return model


def in_fp8(model: nn.Module, kind: Kind) -> None:
    """Let the linear layers of a skeleton that are not in FP8 yet become so, as `--force-fp8` does."""
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    convert(model, forced_specs(linears, kind))


def skeletons(name: str, fmt: Format) -> dict[str, nn.Module]:
    """All parts of a released model by kind.

    Raises:
        RequestError: there is none of this name.
    """
    config = released(name).config
    kinds: tuple[Kind, ...] = ("clip_l", "clip_g", "t5", "mmdit", "vae")
    return {kind: skeleton(kind, fmt, config) for kind in kinds}
