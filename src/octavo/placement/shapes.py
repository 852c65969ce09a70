"""How many bytes each part of a model takes, unit by unit, told from skeletons: modules on the meta device.

A unit is what is streamed at a time: a block of the MMDiT without its modulation, a layer of an encoder, a block of a
ControlNet with its output and without its modulation. What belongs to no unit (embedders, tables of positions, norms)
is the rest of its part; an encoder's table of tokens, of which a prompt needs few rows, lies in host memory where
the encoder is streamed.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from octavo.errors import RequestError
from octavo.fp8 import Fp8Linear
from octavo.models import ClipTextEncoder, ControlNet, MMDiT, T5Encoder
from octavo.models.clip import ClipConfig
from octavo.models.controlnet import ControlNetConfig
from octavo.models.layers import AdaLNModulation
from octavo.models.mmdit import MMDiTConfig
from octavo.models.t5 import T5Config
from octavo.models.vae import VAEConfig

Config = MMDiTConfig | ClipConfig | T5Config | VAEConfig | ControlNetConfig

ENCODERS = ("clip_l", "clip_g", "t5")
KINDS = (*ENCODERS, "mmdit", "controlnet", "vae")


@dataclass(frozen=True, slots=True, kw_only=True)
class PartShape:
    """The bytes of one part."""

    config: Config
    units: tuple[int, ...]  # bytes of each block or layer, without modulation; none for a VAE
    modulation: tuple[int, ...]  # bytes of each adaLN layer of an MMDiT's or a ControlNet's blocks
    table: int  # bytes of an encoder's table of tokens
    rest: int  # bytes of everything else
    fp8: float  # share of its linear layers' weights that are in FP8

    @property
    def nbytes(self) -> int:
        """Of all its weights."""
        return sum(self.units) + sum(self.modulation) + self.table + self.rest


@dataclass(frozen=True, slots=True)
class Shapes:
    """The bytes of each part of a model, by kind; `itemsize` is the compute dtype's."""

    parts: Mapping[str, PartShape]
    itemsize: int = 2

    @classmethod
    def of(cls, parts: Mapping[str, nn.Module], dtype: torch.dtype = torch.bfloat16) -> "Shapes":
        """Of models on any device, the meta device above all.

        Args:
            parts: by kind: mmdit, clip_l, clip_g, t5, vae, controlnet.
            dtype: that weights take which are not in FP8.
        """
        unknown = [kind for kind in parts if kind not in KINDS]
        if unknown or "mmdit" not in parts:
            raise RequestError(f"A model has {', '.join(KINDS)}, an MMDiT at least; these are {', '.join(parts)}.")
        return cls({kind: _shape_of(model, dtype) for kind, model in parts.items()}, dtype.itemsize)

    @property
    def encoders(self) -> dict[str, PartShape]:
        """The text encoders among the parts."""
        return {kind: self.parts[kind] for kind in ENCODERS if kind in self.parts}

    @property
    def nbytes(self) -> int:
        """Of all weights of all parts."""
        return sum(part.nbytes for part in self.parts.values())


def blocks_of(model: nn.Module) -> Sequence[Sequence[nn.Module]]:
    """What of `model` runs one after the other and can be held one at a time, the MMDiT's with its modulation."""
    match model:
        case MMDiT():
            return [[block] for block in model.joint_blocks]
        case ClipTextEncoder():
            return [[layer] for layer in model.text_model.encoder.layers]
        case T5Encoder():
            return [[block] for block in model.encoder.block]
        case ControlNet():
            return [[block, output] for block, output in zip(model.blocks, model.outputs, strict=True)]
    return ()


def modulation_of(model: nn.Module) -> Sequence[Sequence[nn.Module]]:
    """By block of an MMDiT or a ControlNet its adaLN layers, the image's stream first; nothing for other models."""
    if not isinstance(model, MMDiT | ControlNet):
        return ()
    return [[part for part in block.modules() if isinstance(part, AdaLNModulation)] for (block, *_) in blocks_of(model)]


def table_of(model: nn.Module) -> nn.Module | None:
    """The table of tokens of a text encoder."""
    match model:
        case ClipTextEncoder():
            return model.text_model.embeddings.token_embedding
        case T5Encoder():
            return model.shared
    return None


def nbytes_of(module: nn.Module, dtype: torch.dtype) -> int:
    """Of its weights when loaded: FP8 codes a byte, their scales float32, all else in `dtype`."""
    total = 0
    for each in module.modules():
        fp8 = isinstance(each, Fp8Linear)
        for name, tensor in (*each.named_parameters(recurse=False), *each.named_buffers(recurse=False)):
            kept = fp8 and name in ("q", "scale", "input_scale")
            total += tensor.numel() * (tensor.dtype.itemsize if kept else dtype.itemsize)
    return total


def _shape_of(model: nn.Module, dtype: torch.dtype) -> PartShape:
    by_block = [[nbytes_of(each, dtype) for each in block] for block in modulation_of(model)]
    modulation = [nbytes for block in by_block for nbytes in block]
    units = [sum(nbytes_of(module, dtype) for module in block) for block in blocks_of(model)]
    if by_block:
        units = [unit - sum(own) for unit, own in zip(units, by_block, strict=True)]
    table = table_of(model)
    of_table = 0 if table is None else nbytes_of(table, dtype)
    rest = nbytes_of(model, dtype) - sum(units) - sum(modulation) - of_table
    return PartShape(
        config=cast(Config, model.config),
        units=tuple(units),
        modulation=tuple(modulation),
        table=of_table,
        rest=rest,
        fp8=_fp8_share(model.modules()),
    )


def _fp8_share(modules: Iterable[nn.Module]) -> float:
    fp8 = plain = 0
    for module in modules:
        if isinstance(module, Fp8Linear):
            fp8 += module.q.numel()
        elif isinstance(module, nn.Linear):
            plain += module.weight.numel()
    return fp8 / (fp8 + plain) if fp8 + plain else 0.0
