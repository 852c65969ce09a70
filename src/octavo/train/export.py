"""A trained run as files for use: a ComfyUI tree in 16 bits, and the MMDiT once more in FP8.

    checkpoints/octavo-demo.safetensors            MMDiT and VAE, float16, as Stability AI's single files
    diffusion_models/octavo-demo-fp8.safetensors   MMDiT, every linear in e4m3fn with a scale, as ComfyUI's files (the
                                                   package's was made by `octavo quantize`, see docs/embedded.md)
    text_encoders/{clip_l,clip_g,t5xxl}.safetensors, each with its vocabulary beside it

The headers carry what the model is good for (`octavo.domain`, `octavo.words`) and its settings (`octavo.settings`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from octavo.checkpoint.save import save_safetensors
from octavo.fp8.scale import quantize
from octavo.models.vae import VAE
from octavo.train.model import DemoModel, tokenizers

NAME = "octavo-demo"


def export(
    model: DemoModel, vae: VAE, tree: Path, *, settings: Mapping[str, object], domain: str, known: Sequence[str]
) -> list[Path]:
    """Write the tree of files; returns their paths.

    Args:
        model: trained, with averaged weights.
        vae: the one it was trained with.
        tree: the folder, as `models` in ComfyUI.
        settings: recommended ones, as `octavo.checkpoint.presets.Preset` names them.
        domain: in a sentence or two, what the model can draw.
        known: the words it was trained on.
    """
    about = {
        "octavo.settings": json.dumps(dict(settings)),
        "octavo.domain": domain,
        "octavo.words": " ".join(known),
        "license": "Apache-2.0",
    }
    mmdit = {f"model.diffusion_model.{name}": tensor for name, tensor in _float16(model.mmdit).items()}
    first_stage = {f"first_stage_model.{name}": tensor for name, tensor in _float16(vae).items()}
    both = tree / "checkpoints" / f"{NAME}.safetensors"
    in_fp8 = tree / "diffusion_models" / f"{NAME}-fp8.safetensors"
    save_safetensors(both, mmdit | first_stage, about)
    save_safetensors(in_fp8, fp8_tensors(model.mmdit, "model.diffusion_model."), about)
    written = [both, in_fp8]
    clip_words, t5_words = tokenizers()
    encoders = tree / "text_encoders"
    for name in ("clip_l", "clip_g", "t5xxl"):
        weights, vocabulary = encoders / f"{name}.safetensors", encoders / f"{name}.tokenizer.json"
        save_safetensors(weights, _float16(model.get_submodule(name)), {"octavo.config": json.dumps({"kind": name})})
        (t5_words if name == "t5xxl" else clip_words).save(str(vocabulary), pretty=False)
        written += [weights, vocabulary]
    return written


def fp8_tensors(model: nn.Module, prefix: str) -> dict[str, Tensor]:
    """The tensors of `model` with every linear's weight in FP8, one scale a tensor, in ComfyUI's present layout."""
    linears = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    marker = torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8)
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name not in linears:
            tensors[prefix + name] = tensor.half()
            continue
        scaled = quantize(tensor)
        layer = prefix + name.removesuffix(".weight")
        tensors[f"{layer}.weight"] = scaled.q
        tensors[f"{layer}.weight_scale"] = scaled.scale
        tensors[f"{layer}.comfy_quant"] = marker
    return tensors


def _float16(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.half() for name, tensor in model.state_dict().items()}
