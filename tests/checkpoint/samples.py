"""Checkpoints for tests: tiny models, random or recorded, in every layout; the rules are those of golden/diffusers."""

import json
import math
from functools import cache
from pathlib import Path
from zlib import crc32

import torch
from safetensors.torch import load_file
from torch import Tensor

from octavo.checkpoint.kinds import Kind
from octavo.checkpoint.plan import MODELS
from octavo.checkpoint.save import save_safetensors
from octavo.models import ClipConfig, MMDiTConfig, T5Config, VAEConfig
from tests.goldens import golden

MMDIT_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
# As small as the architectures allow, the MMDiT with a block of each sort.
CONFIGS: dict[Kind, object] = {
    "mmdit": MMDiTConfig(
        depth=2, width=128, heads=2, dual_attention=(0,), context_width=96, pooled_width=48, pos_embed_size=24
    ),
    "clip_l": ClipConfig(
        width=64, layers=3, heads=1, mlp_width=128, activation="quick_gelu", vocab_size=500, projection=64
    ),
    "clip_g": ClipConfig(width=80, layers=3, heads=1, mlp_width=192, activation="gelu", vocab_size=500, projection=80),
    "t5": T5Config(width=64, layers=3, heads=4, head_width=16, mlp_width=160, vocab_size=300),
    "vae": VAEConfig(channels=(32, 32, 32, 64), layers_per_block=1, groups=8),
}
# By what all-in-one files call them.
ENCODERS: dict[str, Kind] = {"clip_l": "clip_l", "clip_g": "clip_g", "t5xxl": "t5"}


def recorded(name: str, prefix: str = "") -> dict[str, Tensor]:
    """The recorded weights golden/diffusers/`name`, their prefix taken off."""
    tensors = load_file(golden(f"diffusers/{name}.safetensors"))
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}


@cache
def _random(kind: Kind) -> dict[str, Tensor]:
    shapes = shapes_of(kind, CONFIGS[kind])
    return {name: torch.randn(shape, generator=_generator(name)).half() for name, shape in shapes.items()}


def _generator(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(crc32(name.encode()))


def tiny(kind: Kind) -> dict[str, Tensor]:
    """Random float16 weights of `CONFIGS[kind]` by single-file names; CLIP-L's with the projection of real files."""
    return {name: tensor.clone() for name, tensor in _random(kind).items()}


def all_in_one() -> dict[str, Tensor]:
    """What sd3.5_medium_incl_clips_t5xxl holds, tiny, with the buffers that such files carry along."""
    tensors = {MMDIT_PREFIX + key: tensor for key, tensor in tiny("mmdit").items()}
    tensors |= {VAE_PREFIX + key: tensor for key, tensor in tiny("vae").items()}
    for encoder, kind in ENCODERS.items():
        tensors |= {f"text_encoders.{encoder}.transformer.{key}": tensor for key, tensor in tiny(kind).items()}
    tensors["text_encoders.clip_l.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    tensors["text_encoders.clip_l.logit_scale"] = torch.tensor(4.6)
    tensors["text_encoders.t5xxl.transformer.encoder.embed_tokens.weight"] = torch.zeros(300, 64, dtype=torch.float16)
    tensors["text_encoders.t5xxl.transformer.spiece_model"] = torch.zeros(5, dtype=torch.uint8)
    return tensors


def mmdit_in_diffusers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Single-file weights of an MMDiT in diffusers' layout."""
    depth = len({key.split(".")[1] for key in tensors if key.startswith("joint_blocks.")})
    top = {
        "x_embedder.proj": "pos_embed.proj",
        "context_embedder": "context_embedder",
        "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
        "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
        "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
        "final_layer.linear": "proj_out",
        "final_layer.adaLN_modulation.1": "norm_out.linear",
    }
    single = {
        ("x_block", "attn.proj"): "attn.to_out.0", ("context_block", "attn.proj"): "attn.to_add_out",
        ("x_block", "attn.ln_q"): "attn.norm_q", ("context_block", "attn.ln_q"): "attn.norm_added_q",
        ("x_block", "attn.ln_k"): "attn.norm_k", ("context_block", "attn.ln_k"): "attn.norm_added_k",
        ("x_block", "attn2.proj"): "attn2.to_out.0", ("x_block", "attn2.ln_q"): "attn2.norm_q",
        ("x_block", "attn2.ln_k"): "attn2.norm_k",
        ("x_block", "mlp.fc1"): "ff.net.0.proj", ("context_block", "mlp.fc1"): "ff_context.net.0.proj",
        ("x_block", "mlp.fc2"): "ff.net.2", ("context_block", "mlp.fc2"): "ff_context.net.2",
        ("x_block", "adaLN_modulation.1"): "norm1.linear",
        ("context_block", "adaLN_modulation.1"): "norm1_context.linear",
    }  # fmt: skip
    split = {
        ("x_block", "attn.qkv"): ("attn.to_q", "attn.to_k", "attn.to_v"),
        ("x_block", "attn2.qkv"): ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
        ("context_block", "attn.qkv"): ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    }
    out: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if key == "pos_embed":
            out["pos_embed.pos_embed"] = tensor
            continue
        module, _, ending = key.rpartition(".")
        if not key.startswith("joint_blocks."):
            swapped = module == "final_layer.adaLN_modulation.1"
            out[f"{top[module]}.{ending}"] = torch.cat(tensor.chunk(2)[::-1]) if swapped else tensor
            continue
        _, number, stream, inner = module.split(".", 3)
        block = f"transformer_blocks.{number}"
        if (stream, inner) in split:
            for name, third in zip(split[stream, inner], tensor.chunk(3), strict=True):
                out[f"{block}.{name}.{ending}"] = third
            continue
        last_context = (stream, inner) == ("context_block", "adaLN_modulation.1") and int(number) == depth - 1
        out[f"{block}.{single[stream, inner]}.{ending}"] = torch.cat(tensor.chunk(2)[::-1]) if last_context else tensor
    return out


def vae_in_diffusers(tensors: dict[str, Tensor], *, old: bool = False) -> dict[str, Tensor]:
    """Single-file weights of a four-level VAE in AutoencoderKL's layout; `old` as before diffusers 0.17."""
    attention = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
    if old:
        attention |= {"q": "query", "k": "key", "v": "value", "proj_out": "proj_attn"}
    resnet = {"nin_shortcut": "conv_shortcut"}
    out: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        half, *path, ending = key.split(".")
        match path:
            case ["mid", "attn_1", name]:
                path = ["mid_block", "attentions", "0", attention[name]]
                tensor = tensor.flatten(1) if tensor.ndim == 4 else tensor
            case ["mid", block, name]:
                path = ["mid_block", "resnets", str(int(block[-1]) - 1), name]
            case ["down", level, "block", number, name]:
                path = ["down_blocks", level, "resnets", number, resnet.get(name, name)]
            case ["down", level, "downsample", "conv"]:
                path = ["down_blocks", level, "downsamplers", "0", "conv"]
            case ["up", level, "block", number, name]:
                path = ["up_blocks", str(3 - int(level)), "resnets", number, resnet.get(name, name)]
            case ["up", level, "upsample", "conv"]:
                path = ["up_blocks", str(3 - int(level)), "upsamplers", "0", "conv"]
            case ["norm_out"]:
                path = ["conv_norm_out"]
        out[".".join([half, *path, ending])] = tensor.contiguous()
    return out


def write_shards(folder: Path, stem: str, tensors: dict[str, Tensor], count: int) -> Path:
    """`tensors` over so many shards with their index, as diffusers and transformers save large models."""
    names = sorted(tensors)
    weight_map = {}
    for i in range(count):
        shard = f"{stem}-{i + 1:05}-of-{count:05}.safetensors"
        mine = names[i::count]
        save_safetensors(folder / shard, {name: tensors[name] for name in mine})
        weight_map |= dict.fromkeys(mine, shard)
    index = folder / f"{stem}.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))
    return index


def write_diffusers_folder(root: Path) -> Path:
    """The tiny parts as `save_pretrained` leaves a model, the transformer in three shards."""
    write_shards(root / "transformer", "diffusion_pytorch_model", mmdit_in_diffusers(tiny("mmdit")), 3)
    for folder, kind in zip(("text_encoder", "text_encoder_2", "text_encoder_3"), ENCODERS.values(), strict=True):
        save_safetensors(root / folder / "model.safetensors", tiny(kind))
    (root / "text_encoder" / "config.json").write_text('{"num_attention_heads": 4, "hidden_act": "quick_gelu"}')
    (root / "text_encoder_2" / "config.json").write_text('{"num_attention_heads": 5, "hidden_act": "gelu"}')
    save_safetensors(root / "vae" / "diffusion_pytorch_model.safetensors", vae_in_diffusers(tiny("vae")))
    (root / "vae" / "config.json").write_text('{"norm_num_groups": 16}')
    (root / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusion3Pipeline"}))
    return root


def shapes_of(kind: Kind, config: object, prefix: str = "") -> dict[str, tuple[int, ...]]:
    """Names and shapes of a whole model, without its memory."""
    with torch.device("meta"):
        model = MODELS[kind](config)
    return {prefix + name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def write_hollow(path: Path, shapes: dict[str, tuple[int, ...]], metadata: dict[str, str] | None = None) -> Path:
    """A bfloat16 file of full size whose data is a hole: only its header takes room on the disk."""
    fields: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    position = 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        fields[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(fields).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + position)
    return path
