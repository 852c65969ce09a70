"""Whole pictures by diffusers, stage by stage: transformers' encoders, its pipeline with the transformer, its VAE.

Random weights of the same shapes, made on the device. The pipeline gets embeddings instead of words: tokenizers' files
are nowhere to be had without a download, and cost microseconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from octavo.evaluate.bench_models import default_dtype, fill
from octavo.evaluate.bench_timing import wait_for_device
from octavo.models import ClipConfig, MMDiTConfig, T5Config
from octavo.models.vae import VAEConfig


@dataclass(slots=True)
class Encoder:
    """One of transformers' text encoders, and how many tokens it is given."""

    model: nn.Module
    tokens: int
    vocabulary: int


class PeerPicture:
    """diffusers' StableDiffusion3Pipeline without files.

    Args:
        transformer: of diffusers, on the device.
        encoders: our configurations of CLIP-L, CLIP-G and T5, by those names, each with its number of tokens.
    """

    def __init__(
        self,
        transformer: nn.Module,
        config: MMDiTConfig,
        vae: VAEConfig,
        encoders: dict[str, tuple[ClipConfig | T5Config, int]],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        import diffusers

        library: Any = diffusers
        self._config, self._device, self._dtype = config, device, dtype
        self._encoders = [self._encoder(config, tokens) for config, tokens in encoders.values()]
        self._tokens = max(each for _, each in encoders.values()) + sum(
            tokens for _, tokens in list(encoders.values())[2:]
        )
        levels = len(vae.channels)
        autoencoder = self._random(
            lambda: library.AutoencoderKL(
                in_channels=3,
                out_channels=3,
                down_block_types=("DownEncoderBlock2D",) * levels,
                up_block_types=("UpDecoderBlock2D",) * levels,
                block_out_channels=vae.channels,
                layers_per_block=vae.layers_per_block,
                latent_channels=vae.latent_channels,
                norm_num_groups=vae.groups,
                use_quant_conv=False,
                use_post_quant_conv=False,
                scaling_factor=1.5305,
                shift_factor=0.0609,
            )
        )
        scheduler = library.FlowMatchEulerDiscreteScheduler(shift=3.0)
        nothing = dict.fromkeys(
            ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
        )
        self._pipeline: Any = library.StableDiffusion3Pipeline(transformer, scheduler, autoencoder, **nothing)
        self._pipeline.set_progress_bar_config(disable=True)

    def draw(self, width: int, height: int, steps: int, guidance_scale: float) -> dict[str, float]:
        """Seconds of each stage of one picture, as `bench_picture.draw` has them."""
        marks = [_now()]
        for _ in range(1 if guidance_scale == 1 else 2):  # prompts
            for encoder in self._encoders:
                encoder.model(torch.randint(encoder.vocabulary, (1, encoder.tokens), device=self._device))
        marks.append(_now())

        def embeddings(*shape: int) -> Tensor:
            return torch.randn(1, *shape, device=self._device).to(self._dtype)

        context, pooled = (self._tokens, self._config.context_width), (self._config.pooled_width,)
        latents = self._pipeline(
            prompt_embeds=embeddings(*context),
            negative_prompt_embeds=embeddings(*context),
            pooled_prompt_embeds=embeddings(*pooled),
            negative_pooled_prompt_embeds=embeddings(*pooled),
            width=width,
            height=height,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            output_type="latent",
        ).images
        marks.append(_now())
        pixels = self._pipeline.vae.decode(latents / 1.5305 + 0.0609, return_dict=False)[0]
        self._pipeline.image_processor.postprocess(pixels)
        marks.append(_now())
        encode, denoise, decode = (after - before for before, after in pairwise(marks))
        return {"encode": encode, "denoise": denoise, "decode": decode, "whole": marks[-1] - marks[0]}

    def _encoder(self, config: ClipConfig | T5Config, tokens: int) -> Encoder:
        import transformers

        library: Any = transformers
        if isinstance(config, T5Config):
            theirs = library.T5Config(
                vocab_size=config.vocab_size, d_model=config.width, d_kv=config.head_width, d_ff=config.mlp_width,
                num_layers=config.layers, num_heads=config.heads, feed_forward_proj="gated-gelu",
            )  # fmt: skip
            model = self._random(lambda: library.T5EncoderModel(theirs))
        else:
            theirs = library.CLIPTextConfig(
                vocab_size=config.vocab_size, hidden_size=config.width, intermediate_size=config.mlp_width,
                num_hidden_layers=config.layers, num_attention_heads=config.heads, hidden_act=config.activation,
                max_position_embeddings=config.positions, projection_dim=config.projection or config.width,
            )  # fmt: skip
            model = self._random(lambda: library.CLIPTextModelWithProjection(theirs))
        return Encoder(model, tokens, config.vocab_size)

    def _random(self, build: Callable[[], nn.Module]) -> nn.Module:
        # Built where it runs, in its dtype: T5-XXL in float32 on the host would take 19 GB and a minute.
        with self._device, default_dtype(self._dtype):
            model = build().eval().requires_grad_(False)
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                fill(name, tuple(tensor.shape), tensor)
        return model


def _now() -> float:
    wait_for_device()
    return time.perf_counter()
