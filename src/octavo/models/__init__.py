"""The mathematics of SD3 and SD3.5 in plain `nn.Linear`; FP8, offload and files are other rooms' business."""

from octavo.models.mmdit import MMDiT, MMDiTConfig, Modulation
from octavo.models.vae import VAE, VAEConfig

__all__ = ["VAE", "MMDiT", "MMDiTConfig", "Modulation", "VAEConfig"]
