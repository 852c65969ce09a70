"""Which model is this? Its configuration, read from names and shapes.

Shapes say nearly everything. What they cannot say (heads and activation of a CLIP, groups of a VAE's norms, T5's
longest distance) follows from what released models do, unless a `config.json` beside the file, as in diffusers folders,
or the header's `octavo.config` says otherwise: by field, or by kind and field where a file holds several parts.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NoReturn

from octavo.checkpoint.kinds import CONFIG_KEY, Kind, own_config
from octavo.checkpoint.layout import Names
from octavo.checkpoint.tensors import TensorFile
from octavo.errors import CorruptFileError
from octavo.models import ClipConfig, ControlNetConfig, MMDiTConfig, T5Config, VAEConfig

Config = MMDiTConfig | ClipConfig | T5Config | VAEConfig | ControlNetConfig

CONTROL_TYPES: tuple[Literal["blur", "canny", "depth"], ...] = ("blur", "canny", "depth")  # by number in a file
HEAD_WIDTH = 64  # in every released MMDiT and CLIP
MAX_SIDE = 2**20  # of any matrix of a model; far beyond the largest, yet small enough to multiply two
USUAL_ACTIVATIONS: Mapping[Kind, Literal["quick_gelu", "gelu"]] = {"clip_l": "quick_gelu", "clip_g": "gelu"}
# What Hugging Face's config.json calls the fields of ours that shapes do not tell.
THEIR_NAMES: Mapping[str, Mapping[str, str]] = {
    "clip_l": {"num_attention_heads": "heads", "hidden_act": "activation"},
    "clip_g": {"num_attention_heads": "heads", "hidden_act": "activation"},
    "t5": {"relative_attention_max_distance": "max_distance"},
    "vae": {"norm_num_groups": "groups"},
    "controlnet": {"force_zeros_for_pooled_projection": "zero_pooled"},
}


def detect(file: TensorFile, names: Names) -> Config:
    """The configuration of the part that `names` leads to.

    Raises:
        CorruptFileError: a tensor that tells the shape is missing, or tells an impossible one.
    """
    shapes = _Shapes(file, names)
    kind = names.part.kind
    said = _said_elsewhere(file, kind)
    try:
        if kind == "mmdit":
            return _mmdit(shapes)
        if kind in ("clip_l", "clip_g"):
            return _clip(shapes, kind, said)
        if kind == "t5":
            return _t5(shapes, said)
        if kind == "controlnet":
            return _controlnet(shapes, said)
        assert kind == "vae", f"a {kind} has no configuration"
        return _vae(shapes, said)
    except (TypeError, ValueError) as error:
        shapes.refuse(f"describes an impossible model ({error})")


class _Shapes:
    """Shapes by our names, checked so far that configurations can be computed from them."""

    def __init__(self, file: TensorFile, names: Names) -> None:
        self.file, self.names = file, names

    def of(self, ours: str, rank: int) -> tuple[int, ...]:
        parts = []
        for piece in self.names.pieces(ours):
            entry = self.file.entries.get(piece.name)
            if entry is None:
                self.refuse(f"lacks '{piece.name}', which tells the model's shape")
            shape = entry.shape[::-1] if piece.transposed else entry.shape
            if len(shape) != rank or not all(0 < side <= MAX_SIDE for side in shape):
                self.refuse(f"has '{piece.name}' of shape {list(shape)}; expected {rank} sides from 1 to {MAX_SIDE}")
            parts.append(shape)
        return (sum(shape[0] for shape in parts), *parts[0][1:])

    def blocks(self, stem: str) -> int:
        """How many `stem`.N there are; at least one, without gaps."""
        numbers = self.names.numbers(stem)
        if numbers != set(range(len(numbers))) or not numbers:
            missing = next(i for i in range(len(numbers) + 1) if i not in numbers)
            self.refuse(f"lacks '{self.names.part.prefix}{stem}.{missing}'")
        return len(numbers)

    def refuse(self, what: str) -> NoReturn:
        raise CorruptFileError(f"'{self.file.path}' {what}. Download the file again, or use another version of it.")


def _mmdit(shapes: _Shapes) -> MMDiTConfig:
    names = shapes.names
    depth = shapes.blocks("joint_blocks" if names.part.style == "single-file" else "transformer_blocks")
    width, in_channels, patch_size, _ = shapes.of("x_embedder.proj.weight", 4)
    velocities = shapes.of("final_layer.linear.weight", 2)[0]
    if velocities % patch_size**2:
        shapes.refuse(f"maps to {velocities} numbers a patch, which patches of {patch_size}x{patch_size} do not divide")
    qk_norm = names.has("joint_blocks.0.x_block.attn.ln_q.weight")
    head_width = shapes.of("joint_blocks.0.x_block.attn.ln_q.weight", 1)[0] if qk_norm else HEAD_WIDTH
    if width % head_width:
        shapes.refuse(f"has width {width}, which heads of {head_width} do not divide")
    return MMDiTConfig(
        depth=depth,
        width=width,
        heads=width // head_width,
        dual_attention=tuple(i for i in range(depth) if names.has(f"joint_blocks.{i}.x_block.attn2.qkv.weight")),
        qk_norm=qk_norm,
        patch_size=patch_size,
        in_channels=in_channels,
        out_channels=velocities // patch_size**2,
        context_width=shapes.of("context_embedder.weight", 2)[1],
        pooled_width=shapes.of("y_embedder.mlp.0.weight", 2)[1],
        pos_embed_size=math.isqrt(shapes.of("pos_embed", 3)[1]),
    )


def _clip(shapes: _Shapes, kind: Kind, said: Mapping[str, Any]) -> ClipConfig:
    vocab_size, width = shapes.of("text_model.embeddings.token_embedding.weight", 2)
    projected = kind == "clip_g" and shapes.names.has("text_projection.weight")
    config = ClipConfig(
        width=width,
        layers=shapes.blocks("text_model.encoder.layers"),
        heads=_usual_heads(width),
        mlp_width=shapes.of("text_model.encoder.layers.0.mlp.fc1.weight", 2)[0],
        activation=USUAL_ACTIVATIONS[kind],
        vocab_size=vocab_size,
        positions=shapes.of("text_model.embeddings.position_embedding.weight", 2)[0],
        projection=shapes.of("text_projection.weight", 2)[0] if projected else None,
    )
    config = replace(config, **said)
    if config.activation not in ("quick_gelu", "gelu"):
        shapes.refuse(f"wants the activation {config.activation!r}; CLIP has quick_gelu or gelu")
    if config.heads < 1 or width % config.heads:
        shapes.refuse(f"has width {width}, which {config.heads} heads do not divide")
    return config


def _t5(shapes: _Shapes, said: Mapping[str, Any]) -> T5Config:
    attention, mlp = "encoder.block.0.layer.0.SelfAttention", "encoder.block.0.layer.1.DenseReluDense"
    vocab_size, width = shapes.of("shared.weight", 2)
    buckets, heads = shapes.of(f"{attention}.relative_attention_bias.weight", 2)
    inner = shapes.of(f"{attention}.q.weight", 2)[0]
    if inner % heads:
        shapes.refuse(f"has queries of width {inner}, which {heads} heads do not divide")
    config = T5Config(
        width=width,
        layers=shapes.blocks("encoder.block"),
        heads=heads,
        head_width=inner // heads,
        mlp_width=shapes.of(f"{mlp}.wi_0.weight", 2)[0],
        vocab_size=vocab_size,
        buckets=buckets,
    )
    config = replace(config, **said)
    if not config.max_distance > config.buckets // 4 > 0:
        shapes.refuse(f"wants {config.buckets} buckets for distances up to {config.max_distance}")
    return config


def _vae(shapes: _Shapes, said: Mapping[str, Any]) -> VAEConfig:
    diffusers = shapes.names.part.style == "diffusers"
    levels = shapes.blocks("encoder.down_blocks" if diffusers else "encoder.down")
    channels = tuple(shapes.of(f"encoder.down.{i}.block.0.conv1.weight", 4)[0] for i in range(levels))
    blocks = "encoder.down_blocks.0.resnets" if diffusers else "encoder.down.0.block"
    config = VAEConfig(
        channels=channels,
        layers_per_block=shapes.blocks(blocks),
        latent_channels=shapes.of("decoder.conv_in.weight", 4)[1],
        groups=_usual_groups(channels),
    )
    config = replace(config, **said)
    if config.groups < 1 or any(width % config.groups for width in channels):
        shapes.refuse(f"has {list(channels)} channels, which {config.groups} groups do not divide")
    return config


def _controlnet(shapes: _Shapes, said: Mapping[str, Any]) -> ControlNetConfig:
    names = shapes.names
    depth = shapes.blocks("transformer_blocks")
    width, channels, patch_size, _ = shapes.of("control_embedder.proj.weight", 4)
    joint = names.has("context_embedder.weight")
    stream = "blocks.0.x_block" if joint else "blocks.0"
    qk_norm = names.has(f"{stream}.attn.ln_q.weight")
    head_width = shapes.of(f"{stream}.attn.ln_q.weight", 1)[0] if qk_norm else HEAD_WIDTH
    if width % head_width:
        shapes.refuse(f"has width {width}, which heads of {head_width} do not divide")
    positions = names.has("pos_embed")
    if joint and not positions:
        shapes.refuse("has text tokens but no table of positions, which no known ControlNet does")
    config = ControlNetConfig(
        depth=depth,
        width=width,
        heads=width // head_width,
        joint=joint,
        dual_attention=tuple(i for i in range(depth) if joint and names.has(f"blocks.{i}.x_block.attn2.qkv.weight")),
        qk_norm=qk_norm,
        mlp_ratio=max(1, shapes.of(f"{stream}.mlp.fc1.weight", 2)[0] // width),
        patch_size=patch_size,
        in_channels=shapes.of("x_embedder.proj.weight", 4)[1] if positions else channels,
        control_channels=channels,
        context_width=shapes.of("context_embedder.weight", 2)[1] if joint else 0,
        pooled_width=shapes.of("y_embedder.mlp.0.weight", 2)[1],
        pos_embed_size=math.isqrt(shapes.of("pos_embed", 3)[1]) if positions else 0,
        zero_pooled=joint,
        last=names.part.style == "single-file",
        control_type=_control_type(shapes),
    )
    return replace(config, **said)


def _control_type(shapes: _Shapes) -> Literal["blur", "canny", "depth"] | None:
    file = shapes.file
    if (entry := file.entries.get("control_type")) is None:
        return None
    number = int(file.read("control_type").flatten()[0]) if math.prod(entry.shape) == 1 else -1
    if not 0 <= number < len(CONTROL_TYPES):
        shapes.refuse(f"says control_type {number}; known are {', '.join(CONTROL_TYPES)}, counted from 0")
    return CONTROL_TYPES[number]


def unsaid(kind: Kind, config: Config) -> dict[str, Any]:
    """Fields of `config` that its tensors' names and shapes would not tell; for `octavo.config`."""
    match config:
        case ClipConfig():
            usual: dict[str, Any] = {"heads": _usual_heads(config.width), "activation": USUAL_ACTIVATIONS[kind]}
        case T5Config():
            usual = {"max_distance": T5Config.xxl().max_distance}
        case VAEConfig():
            usual = {"groups": _usual_groups(config.channels)}
        case ControlNetConfig():
            usual = {"zero_pooled": config.joint}
        case _:
            usual = {}
    return {name: getattr(config, name) for name, value in usual.items() if getattr(config, name) != value}


def _usual_heads(width: int) -> int:
    return max(1, width // HEAD_WIDTH)


def _usual_groups(channels: tuple[int, ...]) -> int:
    """Of released models 32; a narrow VAE needs several channels in a group."""
    return max(1, min(32, channels[0] // 4))


def _said_elsewhere(file: TensorFile, kind: Kind) -> dict[str, Any]:
    """Fields of the configuration that shapes do not tell, as the header or a config.json has them."""
    known = THEIR_NAMES.get(kind, {})
    ours = set(known.values())
    said: dict[str, Any] = {}
    for theirs, value in _config_json(file.path).items():
        if theirs in known:
            said[known[theirs]] = value
    own = own_config(file.path, file.metadata)
    of_kind = own.get(kind)
    for fields in (own, of_kind if isinstance(of_kind, dict) else {}):
        said.update((name, value) for name, value in fields.items() if name in ours)
    for name, value in said.items():
        if type(value) is not {"activation": str, "zero_pooled": bool}.get(name, int):
            raise CorruptFileError(
                f"'{file.path}' has {name} = {value!r:.60} in its config.json or under '{CONFIG_KEY}' in its header. "
                "Download or write the file again."
            )
    return said


def _config_json(path: Path) -> dict[str, Any]:
    beside = path.parent / "config.json"
    if not path.name.startswith(("model", "diffusion_pytorch_model")):
        return {}  # not a file of a diffusers folder, so the config.json is of something else
    try:
        config = json.loads(beside.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise CorruptFileError(f"'{beside}' cannot be read ({error}). Download it again.") from error
    return config if isinstance(config, dict) else {}
