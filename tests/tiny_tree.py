"""A models tree with a whole random SD3-like model, as small as the architecture allows."""

from pathlib import Path

import torch
from torch import nn

from octavo.checkpoint.save import save_safetensors
from octavo.models import VAE, ClipConfig, ClipTextEncoder, MMDiT, MMDiTConfig, T5Config, T5Encoder, VAEConfig
from octavo.text import word_level_tokenizer

WORDS = ("a", "red", "blue", "star", "circle", "on", "white", "background")
POSITIONS = 8
MODEL = MMDiTConfig(depth=2, width=128, heads=2, context_width=128, pooled_width=128, pos_embed_size=8)


def write_tiny_tree(root: Path) -> Path:
    """Fill `root` with checkpoints/tiny.safetensors and text_encoders/*, weights from a fixed seed; returns `root`."""
    torch.manual_seed(0)
    rows = 4 + len(WORDS)
    clip = {"width": 64, "layers": 2, "heads": 1, "mlp_width": 64, "vocab_size": rows, "positions": POSITIONS}
    encoders: dict[str, nn.Module] = {
        "clip_l": ClipTextEncoder(ClipConfig(activation="quick_gelu", **clip)),
        "clip_g": ClipTextEncoder(ClipConfig(activation="gelu", projection=64, **clip)),
        "t5xxl": T5Encoder(T5Config(width=128, layers=1, heads=2, head_width=64, mlp_width=64, vocab_size=rows)),
    }
    mmdit = MMDiT(MODEL)
    nn.init.normal_(mmdit.pos_embed, std=0.3)
    vae = VAE(VAEConfig(channels=(16, 16, 16, 16), layers_per_block=1, groups=4))
    both = {f"model.diffusion_model.{name}": tensor.half() for name, tensor in mmdit.state_dict().items()}
    both |= {f"first_stage_model.{name}": tensor.half() for name, tensor in vae.state_dict().items()}
    (root / "checkpoints").mkdir(parents=True)
    (root / "text_encoders").mkdir()
    save_safetensors(root / "checkpoints" / "tiny.safetensors", both, None)
    for name, encoder in encoders.items():
        weights = {key: tensor.half() for key, tensor in encoder.state_dict().items()}
        save_safetensors(
            root / "text_encoders" / f"{name}.safetensors", weights, {"octavo.config": f'{{"kind": "{name}"}}'}
        )
        tokenizer = word_level_tokenizer(WORDS, start=None if name == "t5xxl" else "<start>")
        tokenizer.save(str(root / "text_encoders" / f"{name}.tokenizer.json"))
    return root
