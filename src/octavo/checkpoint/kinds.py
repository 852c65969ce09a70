"""What is in a file? Told from the names and shapes of its tensors alone; no torch.

A file may hold several parts, each under a prefix of its own: the diffusion model, text encoders, a VAE. Their exact
shapes are read in `detect`; how the names inside a part translate is `layout`'s business.
"""

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from octavo.checkpoint.header import Entry
from octavo.errors import CorruptFileError

Kind = Literal["mmdit", "clip_l", "clip_g", "t5", "vae", "lora", "controlnet", "embedding"]
Style = Literal["single-file", "diffusers"]

TITLES: Mapping[Kind, str] = {
    "mmdit": "diffusion model",
    "clip_l": "text encoder CLIP-L",
    "clip_g": "text encoder CLIP-G",
    "t5": "text encoder T5",
    "vae": "VAE",
    "lora": "LoRA",
    "controlnet": "ControlNet",
    "embedding": "textual-inversion embedding",
}

CONFIG_KEY = "octavo.config"
WORDS_KEY = "octavo.words"  # in the header of the embedded model and all made of it: the words it understands

# Prefixes under which parts are found, the more telling first; the empty one is that of files with one part.
MMDIT_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.", "")
CLIP_PREFIXES = (
    "text_encoders.clip_l.transformer.", "text_encoders.clip_g.transformer.",
    "clip_l.transformer.", "clip_g.transformer.", "clip_l.", "clip_g.", "",
)  # fmt: skip
T5_PREFIXES = ("text_encoders.t5xxl.transformer.", "t5xxl.transformer.", "t5xxl.", "")
VAE_PREFIXES = ("first_stage_model.", "vae.", "")

_LORA = re.compile(r"(^lora_(unet|te\d?|transformer)_)|\.(lora_(A|B|up|down|mid)|lora\.(up|down)|hada_w\d|lokr_w\d)\b")
_CONTROLNET = re.compile(r"(^|\.)(controlnet_blocks|control_model|zero_convs?)\.|^control_type$")
_EMBEDDING = re.compile(r"^(emb_params|clip_l|clip_g|t5xxl|string_to_param(\..+)?)$")

# Files that go beside a model, by what their names are like.
ADDITIONS: Sequence[tuple[Kind, Callable[[Collection[str]], bool]]] = (
    ("lora", lambda names: any(_LORA.search(name) for name in names)),
    ("controlnet", lambda names: any(_CONTROLNET.search(name) for name in names)),
    ("embedding", lambda names: 0 < len(names) <= 8 and all(_EMBEDDING.match(name) for name in names)),
)

# What a file of no use here is, by a name in it.
FOREIGN: Sequence[tuple[re.Pattern[str], str]] = (
    (re.compile(r"(^|\.)(input_blocks|output_blocks|down_blocks)\.\d+\..*attentions?|(^|\.)input_blocks\."),
     "a U-Net of Stable Diffusion 1, 2 or XL"),
    (re.compile(r"(^|\.)(double_blocks|single_blocks|single_transformer_blocks)\."), "a FLUX model"),
    (re.compile(r"(^|\.)vision_model\."), "an image encoder"),
    (re.compile(r"(^|\.)(rdb\d|RDB\d|upsampling_blocks?)\."), "an upscaler"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Part:
    """One model inside a file."""

    kind: Kind
    prefix: str  # of all its names
    style: Style
    names: frozenset[str]  # its tensors, prefix included; scales and markers too


class Found(NamedTuple):
    """A part before its tensors are counted."""

    kind: Kind
    prefix: str
    style: Style


def find_parts(path: Path, entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> tuple[Part, ...]:
    """The parts of a file in the order diffusion model, text encoders, VAE; none if it holds nothing known.

    Args:
        path: of the file; its name decides where tensors leave a doubt.
        entries: its tensors.
        metadata: its header's, which may name the kind of a small model's encoder.

    Raises:
        CorruptFileError: the metadata does so, but not as it should.
    """
    for kind, is_part in ADDITIONS:
        if is_part(entries):
            fused = any(name.endswith(".attn.qkv.weight") for name in entries)
            style: Style = "single-file" if kind != "controlnet" or fused else "diffusers"
            return (Part(kind, "", style, frozenset(entries)),)

    found = [
        *_diffusion_model(entries),
        *(
            Found(_which_clip(path, prefix, entries, metadata), prefix, "single-file")
            for prefix in _present(CLIP_PREFIXES, "text_model.", entries)
        ),
        *(Found("t5", prefix, "single-file") for prefix in _present(T5_PREFIXES, "encoder.block.", entries)[:1]),
        *_vae(entries),
    ]
    prefixes = tuple(part.prefix for part in found if part.prefix)

    def belongs(name: str, prefix: str) -> bool:
        return name.startswith(prefix) if prefix else not name.startswith(prefixes)

    return tuple(
        Part(kind, prefix, style, frozenset(name for name in entries if belongs(name, prefix)))
        for kind, prefix, style in found
    )


def what_else(names: Iterable[str]) -> str | None:
    """In words, what a file without known parts is, if that can be told."""
    names = list(names)
    for pattern, what in FOREIGN:
        if any(pattern.search(name) for name in names):
            return what
    return None


def own_config(path: Path, metadata: Mapping[str, str]) -> dict[str, object]:
    """What the header of the file at `path` says of its model beyond what shapes can say, or nothing; see `detect`.

    Raises:
        CorruptFileError: it is not a JSON object.
    """
    try:
        config = json.loads(metadata.get(CONFIG_KEY, "{}"))
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"'{path}' has no JSON under '{CONFIG_KEY}' in its header. Write it again.") from error
    if not isinstance(config, dict):
        raise CorruptFileError(f"'{path}' has no JSON object under '{CONFIG_KEY}' in its header. Write it again.")
    return config


def _diffusion_model(entries: Mapping[str, Entry]) -> list[Found]:
    if single := _present(MMDIT_PREFIXES, "joint_blocks.", entries):
        return [Found("mmdit", single[0], "single-file")]
    # FLUX calls its blocks alike, but has no table of positions to go with its patches.
    alike = _present(MMDIT_PREFIXES, "transformer_blocks.", entries)
    return [Found("mmdit", prefix, "diffusers") for prefix in alike if f"{prefix}pos_embed.proj.weight" in entries][:1]


def _vae(entries: Mapping[str, Entry]) -> list[Found]:
    for prefix in VAE_PREFIXES:
        if f"{prefix}encoder.conv_in.weight" in entries or f"{prefix}decoder.conv_in.weight" in entries:
            in_diffusers = _present((f"{prefix}encoder.", f"{prefix}decoder."), "mid_block.", entries)
            return [Found("vae", prefix, "diffusers" if in_diffusers else "single-file")]
    return []


def _present(prefixes: Iterable[str], beginning: str, entries: Mapping[str, Entry]) -> list[str]:
    return [prefix for prefix in prefixes if any(name.startswith(prefix + beginning) for name in entries)]


def _which_clip(
    path: Path, prefix: str, entries: Mapping[str, Entry], metadata: Mapping[str, str]
) -> Literal["clip_l", "clip_g"]:
    """Released models differ in width. Small ones are told by what is said of them; only CLIP-G is projected."""
    if "clip_l" in prefix:
        return "clip_l"
    if "clip_g" in prefix:
        return "clip_g"
    embedding = entries.get(f"{prefix}text_model.embeddings.token_embedding.weight")
    width = embedding.shape[-1] if embedding is not None and embedding.shape else None
    if width in (768, 1280):
        return "clip_l" if width == 768 else "clip_g"
    kind = own_config(path, metadata).get("kind")
    if kind in ("clip_l", "clip_g"):
        return kind
    stem = path.stem.lower().replace("-", "_")
    if "clip_l" in stem or path.parent.name == "text_encoder":
        return "clip_l"
    if "clip_g" in stem or path.parent.name == "text_encoder_2":
        return "clip_g"
    return "clip_g" if f"{prefix}text_projection.weight" in entries else "clip_l"
