"""The same work by others: diffusers as it comes and compiled, in FP8 by torchao or by layerwise casting.

Each runs in the same turns as ours, on random weights of the same shape. Where one is not installed, the result says
so by name.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from octavo.evaluate.bench_models import default_dtype, fill
from octavo.evaluate.bench_picture import Sheet
from octavo.evaluate.bench_results import Results
from octavo.evaluate.bench_step import draw_inputs
from octavo.evaluate.bench_timing import Timing, ratio
from octavo.fp8.needs import dtype_name
from octavo.models import ClipConfig, MMDiTConfig, T5Config
from octavo.models.vae import VAEConfig
from octavo.pipeline.components import Components, Part

RELEASED_T5_TOKENS = 256

Also = Mapping[str, tuple[Callable[[], object], str]]
"""By name: the call, and the dtype of its products with weights."""


class Peers:
    """What else could do the work on `device`."""

    def __init__(self, results: Results, device: torch.device, dtype: torch.dtype) -> None:
        self.results, self.device, self.dtype = results, device, dtype

    def steps(self, config: MMDiTConfig, batch: int, height: int, width: int, tokens: int) -> Also:
        """One step of diffusers' transformer in every way that is installed."""
        inputs = draw_inputs(config, batch, height, width, tokens).to(self.device, self.dtype)
        found: dict[str, tuple[Callable[[], object], str]] = {}
        for name, make, products in self._ways():
            with self.results.guarded(name):
                model = make(config)

                def call(model: nn.Module = model) -> Tensor:
                    velocity: Tensor = model(
                        hidden_states=inputs.latents,
                        encoder_hidden_states=inputs.context,
                        pooled_projections=inputs.pooled,
                        timestep=inputs.timestep,
                        return_dict=False,
                    )[0]
                    return velocity

                found[name] = (call, products)
        return found

    def pictures(self, components: Components, sheet: Sheet) -> dict[str, Callable[[], dict[str, float]]]:
        """Whole pictures by diffusers, as it comes and by torchao, as far as they are installed; seconds by stage."""
        config, vae = components.mmdit.config, components.vae.config
        assert isinstance(config, MMDiTConfig)
        assert isinstance(vae, VAEConfig)
        scale = sheet.job(components).guidance_scale
        encoders: dict[str, tuple[ClipConfig | T5Config, int]] = {}
        for encoder in components.encoders:
            assert isinstance(encoder.config, ClipConfig | T5Config)
            encoders[encoder.kind] = (encoder.config, self._tokens(components, encoder))
        found: dict[str, Callable[[], dict[str, float]]] = {}
        for name, make, _ in self._ways():
            if name not in ("diffusers", "diffusers_torchao_fp8_compiled"):
                continue
            if importlib.util.find_spec("transformers") is None:
                self.results.leave_out(f"{name}.picture", "transformers is not installed")
                continue
            with self.results.guarded(f"{name}.picture"):
                from octavo.evaluate.bench_peer_pictures import PeerPicture

                peer = PeerPicture(make(config), config, vae, encoders, self.device, self.dtype)
                found[name] = partial(peer.draw, sheet.width, sheet.height, sheet.steps, scale)
        return found

    def _ways(self) -> Iterator[tuple[str, Callable[[MMDiTConfig], nn.Module], str]]:
        """Name, what makes the model, dtype of its products: those that are installed; tells of the others."""
        wide = dtype_name(self.dtype)
        ways: dict[str, tuple[Callable[[nn.Module], nn.Module], str, tuple[str, ...]]] = {
            "diffusers": (lambda model: model, wide, ()),
            "diffusers_layerwise_fp8": (self._layerwise, wide, ()),
            "diffusers_compiled": (self._compiled, wide, ("triton",)),
            "diffusers_torchao_fp8_compiled": (self._torchao, "e4m3fn", ("torchao", "triton")),
        }
        for name, (change, products, packages) in ways.items():
            missing = [each for each in ("diffusers", *packages) if importlib.util.find_spec(each) is None]
            if missing:
                self.results.leave_out(name, f"{' and '.join(missing)} is not installed")
            elif packages and self.device.type != "cuda":  # on a CPU inductor needs a compiler, and minutes
                self.results.leave_out(name, f"is measured on CUDA devices, this is {self.device.type}")
            else:
                yield name, partial(self._made, change), products

    def _made(self, change: Callable[[nn.Module], nn.Module], config: MMDiTConfig) -> nn.Module:
        return change(self._transformer(config))

    def _tokens(self, components: Components, encoder: Part[nn.Module]) -> int:
        """Of a prompt: CLIP's table of positions; 256 of T5-XXL, as diffusers has it."""
        released = isinstance(encoder.config, T5Config) and encoder.config.width == T5Config.xxl().width
        return RELEASED_T5_TOKENS if released else components.text.positions

    def compare(self, timings: Mapping[str, Timing], also: Collection[str], prefix: str) -> None:
        """Ours over theirs, round by round, for each pair."""
        for peer in (name for name in timings if name in also):
            for ours in (name for name in timings if name not in also):
                self.results.add(f"{prefix}.{ours}_over_{peer}", ratio(timings[ours], timings[peer]), "x")

    def _transformer(self, config: MMDiTConfig) -> nn.Module:
        """diffusers' `SD3Transformer2DModel` of this shape, random weights made on the device."""
        with torch.device("meta"), default_dtype(self.dtype):
            model = diffusers_transformer(config)
        # The plain method: diffusers' own has a remark to make. Its table of positions is float32 until then.
        model = nn.Module.to(model, self.dtype).to_empty(device=self.device).eval().requires_grad_(False)
        for name, tensor in model.state_dict().items():
            fill(name, tuple(tensor.shape), tensor)
        return model

    def _compiled(self, model: nn.Module) -> nn.Module:
        model.compile()
        return model

    def _torchao(self, model: nn.Module) -> nn.Module:
        ao: Any = importlib.import_module("torchao.quantization")

        # Rows of both factors have scales of their own; embedders and modulation, of a row for each picture, stay.
        recipe = ao.Float8DynamicActivationFloat8WeightConfig(granularity=ao.PerRow())
        ao.quantize_(model, recipe, filter_fn=_of_tokens)
        return self._compiled(model)

    def _layerwise(self, model: nn.Module) -> nn.Module:
        casting: Any = model
        casting.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=self.dtype)
        return model


def _of_tokens(module: nn.Module, name: str) -> bool:
    """Whether this is a linear layer of diffusers' blocks through which every token goes."""
    return isinstance(module, nn.Linear) and "transformer_blocks" in name and "norm1" not in name


def diffusers_transformer(config: MMDiTConfig) -> nn.Module:
    """diffusers' `SD3Transformer2DModel` of this shape, on the device and in the dtype of the surrounding context."""
    import diffusers

    # Untyped in either case, so that checks give the same with diffusers installed and without.
    build: Any = diffusers.SD3Transformer2DModel
    model: nn.Module = build(
        sample_size=128,
        patch_size=config.patch_size,
        in_channels=config.in_channels,
        num_layers=config.depth,
        attention_head_dim=config.width // config.heads,
        num_attention_heads=config.heads,
        joint_attention_dim=config.context_width,
        caption_projection_dim=config.width,
        pooled_projection_dim=config.pooled_width,
        out_channels=config.out_channels,
        pos_embed_max_size=config.pos_embed_size,
        dual_attention_layers=config.dual_attention,
        qk_norm="rms_norm" if config.qk_norm else None,
    )
    return model
