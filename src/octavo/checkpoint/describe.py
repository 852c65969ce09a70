"""A file in words and numbers, for `octavo info`: what it is, what is inside, how it is kept, how it is best used.

Everything comes from headers; a file that could not be loaded is refused here with the same error as there.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from octavo.checkpoint.detect import Config, detect
from octavo.checkpoint.folders import EMBEDDED
from octavo.checkpoint.header import Entry
from octavo.checkpoint.kinds import TITLES, Kind, Style
from octavo.checkpoint.layout import Names
from octavo.checkpoint.octavo_form import KEY as FORM_KEY
from octavo.checkpoint.plan import MODELS, plan_part
from octavo.checkpoint.presets import Preset, preset_for
from octavo.checkpoint.scales import METADATA_KEY
from octavo.checkpoint.source import Located, open_source
from octavo.models import ClipConfig, ControlNetConfig, MMDiTConfig, T5Config, VAEConfig

DOMAIN_KEY = "octavo.domain"  # what a model can draw, in its maker's words
TOLD_OTHERWISE = frozenset({METADATA_KEY, FORM_KEY, DOMAIN_KEY})  # headers that the description spells out
NEEDED: tuple[tuple[tuple[Kind, ...], str], ...] = (
    (("clip_l", "clip_g", "t5"), "text encoders (octavo pull text-encoders)"),
    (("vae",), "a VAE"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PartDescription:
    """One part of a file."""

    kind: Kind
    what: str  # in words
    file: Path
    prefix: str
    style: Style
    tensors: int
    nbytes: int
    bytes_by_dtype: Mapping[str, int]  # dtypes as spelled in the file; scales and markers count too
    parameters: int | None = None  # weights of the model; None where Octavo does not load such files by themselves
    linear_layers: int = 0
    fp8_layers: int = 0  # of them, kept in FP8
    fp8_form: str | None = None
    fp8_low_rank: int = 0  # FP8 layers with a low-rank branch
    fp8_rowwise: int = 0  # FP8 layers with a scale for each row
    fp8_input_scales: int = 0  # FP8 layers that bring a calibrated input scale
    fp8_full_precision: int = 0  # FP8 layers that ask not to be multiplied in FP8
    config: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """A file or diffusers folder."""

    path: Path
    what: str
    nbytes: int  # of all tensors
    parts: tuple[PartDescription, ...]
    other_tensors: int  # outside of all parts
    other_bytes: int
    preset: Preset | None  # recommended settings, of a diffusion model
    needs: tuple[str, ...]  # what must come from other files
    domain: str | None  # what it can draw, if its maker says
    metadata: Mapping[str, str]

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        fields = asdict(self)
        fields["path"] = str(self.path)
        for part in fields["parts"]:
            part["file"] = str(part["file"])
        return fields


def describe(path: Path) -> Description:
    """Describe the file or folder at `path`.

    Raises:
        ModelNotFoundError: nothing is there.
        CheckpointError: it holds nothing known, or could not be loaded.
    """
    with open_source(path) as source:
        if not source.parts:
            source.require("mmdit")  # says what the file is instead
        parts = tuple(_describe_part(located) for located in source.parts)
        preset = None
        mmdit = source.find("mmdit")
        if mmdit is not None:
            config = detect(mmdit.file, Names(mmdit.part))
            assert isinstance(config, MMDiTConfig)
            preset = preset_for(config, mmdit.file)
        entries = [entry for file in source.files for entry in file.entries.values()]
        claimed = {(located.file, name) for located in source.parts for name in located.part.names}
        others = [entry for file in source.files for name, entry in file.entries.items() if (file, name) not in claimed]
        metadata = {key: value for file in source.files for key, value in file.metadata.items()}
    held = {part.kind for part in parts}
    alone = path.absolute().is_relative_to(EMBEDDED)  # that tree is complete in itself
    return Description(
        path=path,
        what=preset.name if preset else " and ".join(part.what for part in parts),
        nbytes=_nbytes(entries),
        parts=parts,
        other_tensors=len(others),
        other_bytes=_nbytes(others),
        preset=preset,
        needs=tuple(what for kinds, what in NEEDED if preset and not alone and not held.intersection(kinds)),
        domain=metadata.get(DOMAIN_KEY),
        metadata={key: value for key, value in metadata.items() if key not in TOLD_OTHERWISE},
    )


def _describe_part(located: Located) -> PartDescription:
    part, file = located.part, located.file
    entries = [file.entries[name] for name in part.names]
    by_dtype: Counter[str] = Counter()
    for entry in entries:
        by_dtype[entry.dtype] += entry.nbytes
    kept: dict[str, Any] = {
        "kind": part.kind,
        "file": file.path,
        "prefix": part.prefix,
        "style": part.style,
        "tensors": len(entries),
        "nbytes": _nbytes(entries),
        "bytes_by_dtype": dict(by_dtype.most_common()),
    }
    if part.kind not in MODELS:
        return PartDescription(what=_words_for_addition(located), **kept)
    plan = plan_part(located)
    fp8 = [origin for origin in plan.origins if origin.stays_fp8]
    specs = [origin.spec for origin in fp8]
    return PartDescription(
        what=_words(part.kind, plan.config),
        parameters=sum(slab.numel for origin in plan.origins for slab in origin.slabs),
        linear_layers=len(plan.linears),
        fp8_layers=len(specs),
        fp8_form=plan.fp8_form,
        fp8_low_rank=sum(origin.low_rank > 0 for origin in fp8),
        fp8_rowwise=sum(spec.granularity == "row" for spec in specs),
        fp8_input_scales=sum(spec.input_scale for spec in specs),
        fp8_full_precision=sum(spec.full_precision for spec in specs),
        config=asdict(plan.config),
        **kept,
    )


def _words(kind: Kind, config: Config) -> str:
    match config:
        case MMDiTConfig():
            dual = f", second attention in {len(config.dual_attention)}" if config.dual_attention else ""
            norm = "" if config.qk_norm else ", no qk-norm"
            return f"MMDiT, {config.depth} blocks of width {config.width}{dual}{norm}"
        case ClipConfig():
            return f"{TITLES[kind]}, {config.layers} layers of width {config.width}, {config.positions} tokens"
        case T5Config():
            return f"{TITLES[kind]}, {config.layers} layers of width {config.width}"
        case ControlNetConfig():
            what = f" for {config.control_type}" if config.control_type else ""
            text = ", with text" if config.joint else ""
            return f"ControlNet{what}, {config.depth} blocks of width {config.width}{text}"
        case VAEConfig():
            return f"VAE, {config.latent_channels} latent channels, factor {config.factor}"


def _words_for_addition(located: Located) -> str:
    """LoRA and embedding files, told a little closer."""
    part, file = located.part, located.file
    if part.kind == "lora":
        downs = [entry for name, entry in file.entries.items() if "lora_down" in name or "lora_A" in name]
        ranks = sorted({entry.shape[0] for entry in downs if entry.shape})
        rank = f", rank {' to '.join(map(str, {ranks[0]: 0, ranks[-1]: 0}))}" if ranks else ""
        return f"LoRA{rank}, {len(downs)} layers"
    vectors = sum(math.prod(entry.shape[:-1]) for entry in file.entries.values())
    return f"{TITLES[part.kind]}, {vectors} vectors"


def _nbytes(entries: list[Entry]) -> int:
    return sum(entry.nbytes for entry in entries)
