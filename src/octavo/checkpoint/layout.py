"""Names: ours ↔ single file ↔ diffusers.

Ours are those of the single files without prefix (Hugging Face's for the text encoders), so most names are equal. Where
diffusers keeps one matrix in three, or the halves of one the other way round, a name of ours is made of several pieces.

Tables are by module; `.weight`, `.bias` and the names of scales hang on.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from octavo.checkpoint.kinds import Kind, Part, Style

# joint_blocks.N.* ← transformer_blocks.N.*
MMDIT_BLOCK: Mapping[str, tuple[str, ...]] = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block.attn.proj": ("attn.to_out.0",),
    "x_block.attn.ln_q": ("attn.norm_q",),
    "x_block.attn.ln_k": ("attn.norm_k",),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "x_block.attn2.proj": ("attn2.to_out.0",),
    "x_block.attn2.ln_q": ("attn2.norm_q",),
    "x_block.attn2.ln_k": ("attn2.norm_k",),
    "x_block.mlp.fc1": ("ff.net.0.proj",),
    "x_block.mlp.fc2": ("ff.net.2",),
    "x_block.adaLN_modulation.1": ("norm1.linear",),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "context_block.attn.proj": ("attn.to_add_out",),
    "context_block.attn.ln_q": ("attn.norm_added_q",),
    "context_block.attn.ln_k": ("attn.norm_added_k",),
    "context_block.mlp.fc1": ("ff_context.net.0.proj",),
    "context_block.mlp.fc2": ("ff_context.net.2",),
    "context_block.adaLN_modulation.1": ("norm1_context.linear",),
}
MMDIT_REST: Mapping[str, str] = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "context_embedder": "context_embedder",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
# Alternatives: older diffusers files use the second set of names for attention.
VAE_ATTENTION: Mapping[str, tuple[str, ...]] = {
    "norm": ("group_norm",),
    "q": ("to_q", "query"),
    "k": ("to_k", "key"),
    "v": ("to_v", "value"),
    "proj_out": ("to_out.0", "proj_attn"),
}
VAE_SHORTCUT = ("nin_shortcut", "conv_shortcut")

# Tensors that some files carry and no model needs, by kind; names without prefix.
KNOWN_SURPLUS: Mapping[str, re.Pattern[str]] = {
    "clip_l": re.compile(
        r"text_model\.embeddings\.position_ids|logit_scale|text_projection(\.weight)?|vision_model\..*|visual_projection\..*"
    ),
    "clip_g": re.compile(
        r"text_model\.embeddings\.position_ids|logit_scale|text_projection|vision_model\..*|visual_projection\..*"
    ),
    "t5": re.compile(r"encoder\.embed_tokens\.weight|decoder\..*|lm_head\.weight|logit_scale|spiece_model"),
    "vae": re.compile(r"(loss|model_ema)\..*"),
    "controlnet": re.compile(r"control_type"),
}


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor of a file, or one half of its rows."""

    name: str
    half: int | None = None  # 0 the first, 1 the second half
    transposed: bool = False  # kept as [in, out]


def pieces_in(kind: Kind, style: Style, ours: str, *, depth: int = 0, levels: int = 0) -> tuple[Piece, ...]:
    """What our tensor `ours` is made of in files of this style, by the names of today and without prefix.

    Args:
        depth: blocks of an MMDiT.
        levels: of a VAE.
    """
    if style == "diffusers" and kind == "mmdit":
        return _mmdit_in_diffusers(ours, depth)
    if kind == "controlnet":
        return _controlnet(ours, style)
    if style == "diffusers" and kind == "vae":
        return (Piece(_vae_in_diffusers(ours, levels)[0]),)
    return (Piece(ours),)


class Names:
    """Where the tensors of one part are found in its file."""

    def __init__(self, part: Part) -> None:
        self.part = part
        self.depth = len(self.numbers("joint_blocks" if part.style == "single-file" else "transformer_blocks"))
        self._levels = len(self.numbers("decoder.up_blocks"))

    def pieces(self, ours: str) -> tuple[Piece, ...]:
        """What makes up our tensor `ours`, stacked along the first dimension; the names need not be in the file."""
        pieces = self._pieces(ours)
        return tuple(Piece(self.part.prefix + piece.name, piece.half, piece.transposed) for piece in pieces)

    def has(self, ours: str) -> bool:
        """Whether the file holds all pieces of our tensor `ours`."""
        return all(piece.name in self.part.names for piece in self.pieces(ours))

    def numbers(self, stem: str) -> set[int]:
        """The N for which there are names that begin with `stem`.N."""
        pattern = re.compile(re.escape(f"{self.part.prefix}{stem}.") + r"(\d{1,4})\.")
        return {int(match[1]) for name in self.part.names if (match := pattern.match(name))}

    def surplus(self, used: frozenset[str]) -> list[str]:
        """Names, sorted, that are neither `used` nor known to be of no use."""
        known = KNOWN_SURPLUS.get(self.part.kind)
        left = sorted(self.part.names - used)
        return [name for name in left if known is None or not known.fullmatch(name.removeprefix(self.part.prefix))]

    def _pieces(self, ours: str) -> tuple[Piece, ...]:
        kind, style = self.part.kind, self.part.style
        if kind == "mmdit" and style == "diffusers":
            return _mmdit_in_diffusers(ours, self.depth)
        if kind == "controlnet":
            return _controlnet(ours, style)
        if kind == "vae" and style == "diffusers":
            return (Piece(self._first_present(_vae_in_diffusers(ours, self._levels))),)
        if (
            kind == "clip_g"
            and ours == "text_projection.weight"
            and not self._holds(ours)
            and self._holds("text_projection")
        ):
            return (Piece("text_projection", transposed=True),)
        if kind == "t5" and ours == "shared.weight":
            return (Piece(self._first_present(("shared.weight", "encoder.embed_tokens.weight"))),)
        return (Piece(ours),)

    def _first_present(self, alternatives: tuple[str, ...]) -> str:
        return next((name for name in alternatives if self._holds(name)), alternatives[0])

    def _holds(self, name: str) -> bool:
        return self.part.prefix + name in self.part.names


def _mmdit_in_diffusers(ours: str, depth: int) -> tuple[Piece, ...]:
    if ours == "pos_embed":
        return (Piece("pos_embed.pos_embed"),)
    module, _, ending = ours.rpartition(".")
    if match := re.fullmatch(r"joint_blocks\.(\d+)\.(.+)", module):
        number = int(match[1])
        names = tuple(f"transformer_blocks.{number}.{name}.{ending}" for name in MMDIT_BLOCK[match[2]])
        swapped = match[2] == "context_block.adaLN_modulation.1" and number == depth - 1
    else:
        names = (f"{MMDIT_REST[module]}.{ending}",)
        swapped = module == "final_layer.adaLN_modulation.1"
    if swapped:  # (shift, scale) here, (scale, shift) in diffusers
        return (Piece(names[0], half=1), Piece(names[0], half=0))
    return tuple(Piece(name) for name in names)


def _controlnet(ours: str, style: Style) -> tuple[Piece, ...]:
    """Both kinds of files call most things as diffusers does; only the released ones have an MMDiT's own blocks."""
    if ours == "pos_embed":
        return (Piece("pos_embed.pos_embed"),)
    module, _, ending = ours.rpartition(".")
    if match := re.fullmatch(r"blocks\.(\d+)\.(.+)", module):
        block, inside = match.groups()
        if style == "single-file":
            return (Piece(f"transformer_blocks.{block}.{inside}.{ending}"),)
        joint = inside.startswith(("x_block.", "context_block."))
        names = MMDIT_BLOCK[inside if joint else f"x_block.{inside}"]
        return tuple(Piece(f"transformer_blocks.{block}.{name}.{ending}") for name in names)
    if module.startswith("outputs."):
        return (Piece(f"controlnet_blocks.{module.removeprefix('outputs.')}.{ending}"),)
    theirs = "pos_embed_input.proj" if module == "control_embedder.proj" else MMDIT_REST[module]
    return (Piece(f"{theirs}.{ending}"),)


def _vae_in_diffusers(ours: str, levels: int) -> tuple[str, ...]:
    """Alternatives for the name of `ours` in diffusers' AutoencoderKL of so many levels."""
    name = ours.replace(*VAE_SHORTCUT)
    name = re.sub(r"\.norm_out\.", ".conv_norm_out.", name)
    name = re.sub(r"\.mid\.block_(\d)\.", lambda match: f".mid_block.resnets.{int(match[1]) - 1}.", name)
    name = re.sub(r"\.down\.(\d+)\.block\.(\d+)\.", r".down_blocks.\1.resnets.\2.", name)
    name = re.sub(r"\.down\.(\d+)\.downsample\.", r".down_blocks.\1.downsamplers.0.", name)
    # Levels are counted from the pixels in single files, in the order of work in diffusers.
    name = re.sub(r"\.up\.(\d+)\.block\.", lambda match: f".up_blocks.{levels - 1 - int(match[1])}.resnets.", name)
    name = re.sub(
        r"\.up\.(\d+)\.upsample\.", lambda match: f".up_blocks.{levels - 1 - int(match[1])}.upsamplers.0.", name
    )
    if match := re.fullmatch(r"(.+)\.mid\.attn_1\.(\w+)\.(weight|bias)", name):
        half, module, ending = match.groups()
        return tuple(f"{half}.mid_block.attentions.0.{theirs}.{ending}" for theirs in VAE_ATTENTION[module])
    return (name,)
