"""A trained low-rank change → the tensors of a LoRA file, in the names that other programs read.

    diffusers   transformer.transformer_blocks.0.attn.to_q.lora_A.weight, …lora_B.weight (PEFT); alpha is part of B
    kohya       lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight, …lora_up.weight, …alpha; ComfyUI's, A1111's

One of our layers can be several of diffusers', which then share A. Reading is `checkpoint.lora`'s business.
"""

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from octavo.checkpoint.layout import pieces_in
from octavo.models.adapter import LowRank

LoraForm = Literal["diffusers", "kohya"]
FORMS: tuple[LoraForm, ...] = get_args(LoraForm)


def tensors_of(
    layers: Mapping[str, LowRank], form: LoraForm, *, depth: int, alpha: float | None = None, dtype: torch.dtype
) -> dict[str, Tensor]:
    """What a file holds.

    Args:
        layers: changes by our name of the layer, their scale within `up`.
        form: whose names.
        depth: blocks of the MMDiT.
        alpha: to note in kohya's form, where `up` then is kept without its share alpha / rank; the rank if None.
        dtype: of the numbers.

    Returns:
        Tensors on the CPU, each with memory of its own.
    """
    tensors: dict[str, Tensor] = {}
    for name, change in layers.items():
        rank = len(change.down)
        if form == "kohya":
            stem = f"lora_unet_{name.replace('.', '_')}"
            noted = float(rank) if alpha is None else alpha
            tensors[f"{stem}.alpha"] = torch.tensor(noted, dtype=dtype)
            tensors[f"{stem}.lora_down.weight"] = _kept(change.down, dtype)
            tensors[f"{stem}.lora_up.weight"] = _kept(change.up * (rank / noted), dtype)
            continue
        pieces = pieces_in("mmdit", "diffusers", f"{name}.weight", depth=depth)
        rows = change.up.chunk(len(pieces))
        halves = [piece.half for piece in pieces]
        if any(half is not None for half in halves):
            # One matrix of the file, whose halves are the other way round.
            names, order = {piece.name for piece in pieces}, sorted(range(len(pieces)), key=lambda i: halves[i] or 0)
            assert len(names) == 1
            parts = {pieces[0].name: torch.cat([rows[i] for i in order])}
        else:
            parts = {piece.name: up for piece, up in zip(pieces, rows, strict=True)}
        for piece_name, up in parts.items():
            stem = f"transformer.{piece_name.removesuffix('.weight')}"
            tensors[f"{stem}.lora_A.weight"] = _kept(change.down, dtype)
            tensors[f"{stem}.lora_B.weight"] = _kept(up, dtype)
    return tensors


def _kept(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to("cpu", dtype, copy=True).contiguous()
