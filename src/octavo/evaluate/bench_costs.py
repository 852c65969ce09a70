"""How much work a model is: multiplications by kind, counted on the meta device, and the least time they can take.

torch's own counter goes through one call of the model without numbers, so the counts hold for any model and need no
formula; a test holds them against the formulas on paper.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from octavo.models import VAE, ClipConfig, ClipTextEncoder, MMDiT, MMDiTConfig, Modulation, T5Config, T5Encoder
from octavo.models.vae import VAEConfig


@dataclass(frozen=True, slots=True)
class Work:
    """Floating-point operations of one call; a multiplication and an addition are two."""

    linear: float  # with the weights of linear layers, which may be FP8
    other: float = 0.0  # attention and convolutions

    @property
    def total(self) -> float:
        return self.linear + self.other

    def __add__(self, more: Work) -> Work:
        return Work(self.linear + more.linear, self.other + more.other)

    def times(self, count: float) -> Work:
        return Work(self.linear * count, self.other * count)


@cache
def step_work(config: MMDiTConfig, batch: int, height: int, width: int, tokens: int) -> Work:
    """One evaluation of the velocity, without its modulation.

    Args:
        height, width: of the latents.
        tokens: of text.
    """
    with torch.device("meta"):
        mmdit = MMDiT(config).requires_grad_(False)
        table = _meta_table(mmdit, batch)
        latents = torch.empty(batch, config.in_channels, height, width)
        context = torch.empty(batch, tokens, config.context_width)
    return counted(mmdit, lambda: mmdit(latents, context, table))


@cache
def modulation_work(config: MMDiTConfig, rows: int) -> Work:
    """The tables of `rows` rows."""
    with torch.device("meta"):
        mmdit = MMDiT(config).requires_grad_(False)
        timestep, pooled = torch.empty(rows), torch.empty(rows, config.pooled_width)
    return Work(counted(mmdit, lambda: mmdit.modulation(timestep, pooled)).total)


@cache
def decode_work(config: VAEConfig, batch: int, height: int, width: int) -> Work:
    """Latents of `height` × `width` to pixels."""
    with torch.device("meta"):
        vae = VAE(config).requires_grad_(False)
        latents = torch.empty(batch, config.latent_channels, height, width)
    return counted(vae, lambda: vae.decode(latents))


@cache
def encode_work(config: ClipConfig | T5Config, tokens: int) -> Work:
    """One chunk of text through one encoder."""
    with torch.device("meta"):
        ids = torch.zeros(1, tokens, dtype=torch.int64)
        if isinstance(config, T5Config):
            t5 = T5Encoder(config).requires_grad_(False)
            return counted(t5, lambda: t5(ids))
        clip, end = ClipTextEncoder(config).requires_grad_(False), torch.zeros(1, dtype=torch.int64)
    return counted(clip, lambda: clip(ids, end=end))


def counted(model: nn.Module, call: Callable[[], object]) -> Work:
    """What `call` of `model`, which is on the meta device, multiplies."""
    counter = FlopCounterMode(display=False)
    # Its hooks fail where gradients are off but weights ask for them; on meta there is nothing to differentiate.
    with torch.inference_mode(False), torch.enable_grad(), counter:
        call()
    by_module = {name: sum(operators.values()) for name, operators in counter.get_flop_counts().items()}
    root = type(model).__name__
    # By module, not by operator: a linear layer of an input with gaps is computed as attention's products are.
    linears = (f"{root}.{name}" for name, module in model.named_modules() if isinstance(module, nn.Linear))
    linear = sum(by_module.get(name, 0) for name in linears)
    return Work(float(linear), float(by_module.get("Global", 0) - linear))


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all weights and buffers of `model` that have memory."""
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    return sum(tensor.nbytes for tensor in tensors if not tensor.is_meta)


def _meta_table(mmdit: MMDiT, batch: int) -> Modulation:
    return mmdit.modulation(torch.empty(batch), torch.empty(batch, mmdit.config.pooled_width))
