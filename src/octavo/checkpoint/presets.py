"""How each released model is meant to be used, as data.

The settings are those that the model cards and Stability AI's own code recommend. A file may carry its own in the
header under `octavo.settings`, as the embedded model does; they are laid over the table.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

from octavo.checkpoint.tensors import TensorFile
from octavo.errors import CorruptFileError, RequestError
from octavo.models import MMDiTConfig
from octavo.sampling.guidance import SkipLayerGuidance

SETTINGS_KEY = "octavo.settings"


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """Settings that suit a model, used wherever the user asked for nothing else."""

    name: str  # of the model, for people
    steps: int = 28
    guidance_scale: float = 4.5
    sampler: str = "dpmpp_2m"
    schedule: str = "sgm_uniform"
    shift: float = 3.0
    width: int = 1024  # pixels
    height: int = 1024  # pixels
    skip_layer_guidance: SkipLayerGuidance | None = None


SD3_MEDIUM = Preset(name="SD3 Medium", steps=50, guidance_scale=5.0, sampler="euler")
MEDIUM = Preset(name="SD3.5 Medium", steps=40, guidance_scale=5.0, skip_layer_guidance=SkipLayerGuidance())
LARGE = Preset(name="SD3.5 Large", steps=40, guidance_scale=4.5)
LARGE_TURBO = Preset(name="SD3.5 Large Turbo", steps=4, guidance_scale=1.0, sampler="euler")


RELEASED = (
    (MMDiTConfig.sd3_medium(), SD3_MEDIUM),
    (MMDiTConfig.medium(), MEDIUM),
    (MMDiTConfig.large(), LARGE),
)


def preset_for(config: MMDiTConfig, file: TensorFile) -> Preset:
    """The settings for a diffusion model, told by its shape, its file's name and what the file says of itself.

    Large and Large Turbo have equal shapes, so the name decides: a Turbo has "turbo" in its file's or folder's name.

    Raises:
        CorruptFileError: the file carries settings that make no sense.
    """
    known = next((preset for released, preset in RELEASED if _alike(config, released)), None)
    if known is LARGE and any("turbo" in part.lower() for part in file.path.absolute().parts[-3:]):
        known = LARGE_TURBO
    if known is None:
        # As large as the model can draw, if it cannot draw the usual size.
        side = min(1024, config.pos_embed_size * config.patch_size * 8)
        known = Preset(name=f"SD3-like model of {config.depth} blocks, width {config.width}", width=side, height=side)
    return _with_own_settings(known, file.metadata, file.path)


def _alike(a: MMDiTConfig, b: MMDiTConfig) -> bool:
    # Tables of positions have been cut and widened by fine-tuners; the blocks make the model.
    return replace(a, pos_embed_size=0) == replace(b, pos_embed_size=0)


def _with_own_settings(preset: Preset, metadata: Mapping[str, str], path: Path) -> Preset:
    """`preset` with the settings that the header carries laid over it; unknown names are left to newer versions."""
    if SETTINGS_KEY not in metadata:
        return preset
    try:
        given = json.loads(metadata[SETTINGS_KEY])
        known = {name: value for name, value in given.items() if name in {field.name for field in fields(Preset)}}
        guidance = known.get("skip_layer_guidance")
        if guidance is not None:
            known["skip_layer_guidance"] = SkipLayerGuidance(**{**guidance, "layers": tuple(guidance["layers"])})
        for name, value in known.items():
            kind = type(getattr(LARGE, name))
            if name != "skip_layer_guidance" and not (type(value) is kind or (kind is float and type(value) is int)):
                raise TypeError(f"{name} is {value!r}")
        return replace(preset, **known)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, RequestError) as error:
        raise CorruptFileError(
            f"'{path}' carries settings that make no sense in its header, under '{SETTINGS_KEY}' ({error}). "
            "Write the file again."
        ) from error
