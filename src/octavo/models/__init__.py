"""The mathematics of SD3 and SD3.5 in plain `nn.Linear`; FP8, offload and files are other rooms' business."""

from octavo.models.clip import ClipConfig, ClipTextEncoder
from octavo.models.controlnet import ControlNet, ControlNetConfig
from octavo.models.mmdit import MMDiT, MMDiTConfig, Modulation
from octavo.models.t5 import T5Config, T5Encoder
from octavo.models.vae import VAE, VAEConfig

__all__ = [
    "VAE",
    "ClipConfig",
    "ClipTextEncoder",
    "ControlNet",
    "ControlNetConfig",
    "MMDiT",
    "MMDiTConfig",
    "Modulation",
    "T5Config",
    "T5Encoder",
    "VAEConfig",
]
