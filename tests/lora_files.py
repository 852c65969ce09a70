"""Small LoRA files for tests, random by a seed."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from octavo.checkpoint.save import save_safetensors

MMDIT_LAYERS = (
    "joint_blocks.0.x_block.attn.qkv",
    "joint_blocks.0.context_block.attn.qkv",
    "joint_blocks.1.x_block.mlp.fc1",
    "joint_blocks.1.x_block.adaLN_modulation.1",
    "final_layer.linear",
)
CLIP_LAYERS = ("text_model.encoder.layers.0.self_attn.q_proj", "text_model.encoder.layers.1.mlp.fc1")


def low_rank(
    model: nn.Module, layers: Sequence[str], *, size: float, rank: int = 4, seed: int = 0
) -> dict[str, Tensor]:
    """lora_down and lora_up of some layers, by our names; each change is about `size` times its weight."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name in layers:
        layer = model.get_submodule(name)
        rows, columns = int(layer.out_features), int(layer.in_features)  # type: ignore[arg-type]
        tensors[f"{name}.lora_down.weight"] = torch.randn(rank, columns, generator=generator) / columns**0.5
        tensors[f"{name}.lora_up.weight"] = size * torch.randn(rows, rank, generator=generator) / rank**0.5
    return tensors


def write_lora(path: Path, *, mmdit: dict[str, Tensor] | None = None, clip_l: dict[str, Tensor] | None = None) -> Path:
    """A file as ComfyUI writes them."""
    tensors = {f"diffusion_model.{name}": tensor for name, tensor in (mmdit or {}).items()}
    tensors |= {f"text_encoders.clip_l.transformer.{name}": tensor for name, tensor in (clip_l or {}).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_safetensors(path, tensors)
    return path


def merge_into(model: nn.Module, tensors: dict[str, Tensor], strength: float) -> None:
    """Add the changes to the weights for good."""
    for name in {name.removesuffix(".lora_down.weight") for name in tensors if name.endswith("down.weight")}:
        change = tensors[f"{name}.lora_up.weight"] @ tensors[f"{name}.lora_down.weight"]
        with torch.no_grad():
            model.get_submodule(name).weight.add_(strength * change)  # type: ignore[operator]
