"""Quantized checkpoints for tests, written out by hand from the description of the form."""

import json
from typing import Any

import torch
from torch import Tensor

from tests.checkpoint.samples import MMDIT_PREFIX, tiny

KEY = "octavo.quantization"
FORMATS = {"float8_e4m3fn": (torch.float8_e4m3fn, 448.0), "float8_e5m2": (torch.float8_e5m2, 57344.0)}


def matrices(tensors: dict[str, Tensor]) -> list[str]:
    """Layers of the blocks, without `.weight`."""
    return [
        name.removesuffix(".weight")
        for name, tensor in tensors.items()
        if "blocks." in name and name.endswith(".weight") and tensor.ndim == 2
    ]


def octavo_file(
    *,
    granularity: str = "row",
    fmt: str = "float8_e4m3fn",
    rank: int = 0,
    prefix: str = MMDIT_PREFIX,
    input_scale: float | None = None,
    full_precision: bool = False,
    block: tuple[int, int] = (128, 128),
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Tensor]]:
    """The tiny MMDiT with all matrices of its blocks quantized.

    Returns:
        The file's tensors, what belongs under `KEY`, and the weights in float32 that the file stands for, by
        single-file names without prefix.
    """
    generator = torch.Generator().manual_seed(1)
    dtype, largest = FORMATS[fmt]
    source = tiny("mmdit")
    tensors = {prefix + name: tensor for name, tensor in source.items()}
    values = {name: tensor.float() for name, tensor in source.items()}
    layers: dict[str, Any] = {}
    for name in matrices(source):
        weight, full = values[f"{name}.weight"], prefix + name
        scale = amax(weight, granularity, block) / largest
        each = spread(scale, weight, block) if granularity == "block" else scale
        codes = (weight / each).to(dtype)
        tensors |= {f"{full}.weight": codes, f"{full}.weight_scale": scale}
        values[f"{name}.weight"] = codes.float() * each
        layers[full] = {"format": fmt, "granularity": granularity}
        if granularity == "block":
            layers[full]["block"] = list(block)
        if rank:
            down = torch.randn(rank, weight.shape[1], generator=generator).half() / 8
            up = torch.randn(weight.shape[0], rank, generator=generator).half() / 8
            tensors |= {f"{full}.low_rank_down": down, f"{full}.low_rank_up": up}
            values[f"{name}.weight"] += up.float() @ down.float()
            layers[full]["low_rank"] = rank
        if input_scale is not None:
            tensors[f"{full}.input_scale"] = torch.tensor(input_scale)
        if full_precision:
            layers[full]["full_precision"] = True
    return tensors, {"version": 1, "layers": layers}, values


def amax(weight: Tensor, granularity: str, block: tuple[int, int]) -> Tensor:
    """Largest absolute values, block by block as in the definition."""
    if granularity == "tensor":
        return weight.abs().amax()
    if granularity == "row":
        return weight.abs().amax(1, keepdim=True)
    rows = [part.split(block[1], dim=1) for part in weight.abs().split(block[0], dim=0)]
    return torch.stack([torch.stack([each.amax() for each in row]) for row in rows])


def spread(scale: Tensor, weight: Tensor, block: tuple[int, int]) -> Tensor:
    """For each number of the weight the scale of its block."""
    rows = torch.arange(weight.shape[0]) // block[0]
    columns = torch.arange(weight.shape[1]) // block[1]
    return scale[rows][:, columns]


def header(fields: object, **others: str) -> dict[str, str]:
    """A header with this description."""
    return {KEY: json.dumps(fields), **others}
