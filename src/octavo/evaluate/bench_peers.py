"""The same work by others: diffusers as it comes and compiled, in FP8 by torchao or by layerwise casting.

Each runs in the same turns as ours, on random weights of the same shape. Where one is not installed, the result says
so by name.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from octavo.evaluate.bench_models import fill
from octavo.evaluate.bench_results import Results
from octavo.evaluate.bench_step import draw_inputs
from octavo.evaluate.bench_timing import Timing, ratio
from octavo.fp8.needs import dtype_name
from octavo.models import MMDiTConfig

Also = Mapping[str, tuple[Callable[[], object], str]]
"""By name: the call, and the dtype of its products with weights."""


class Peers:
    """What else could do the work on `device`."""

    def __init__(self, results: Results, device: torch.device, dtype: torch.dtype) -> None:
        self.results, self.device, self.dtype = results, device, dtype

    def steps(self, config: MMDiTConfig, batch: int, height: int, width: int, tokens: int) -> Also:
        """One step of diffusers' transformer in every way that is installed."""
        ways: dict[str, tuple[Callable[[nn.Module], nn.Module], str, tuple[str, ...]]] = {
            "diffusers": (lambda model: model, dtype_name(self.dtype), ()),
            "diffusers_layerwise_fp8": (self._layerwise, dtype_name(self.dtype), ()),
        }
        if self.device.type == "cuda":  # on a CPU inductor needs a compiler, and minutes
            ways["diffusers_compiled"] = (self._compiled, dtype_name(self.dtype), ("triton",))
            ways["diffusers_torchao_fp8_compiled"] = (self._torchao, "e4m3fn", ("torchao", "triton"))
        else:
            for name in ("diffusers_compiled", "diffusers_torchao_fp8_compiled"):
                self.results.leave_out(name, f"is measured on CUDA devices, this is {self.device.type}")
        inputs = draw_inputs(config, batch, height, width, tokens).to(self.device, self.dtype)
        found: dict[str, tuple[Callable[[], object], str]] = {}
        for name, (change, products, packages) in ways.items():
            missing = [each for each in ("diffusers", *packages) if importlib.util.find_spec(each) is None]
            if missing:
                self.results.leave_out(name, f"{' and '.join(missing)} is not installed")
                continue
            with self.results.guarded(name):
                model = change(self._transformer(config))

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

    def compare(self, timings: Mapping[str, Timing], also: Also, prefix: str) -> None:
        """Ours over theirs, round by round, for each pair."""
        for peer in (name for name in timings if name in also):
            for ours in (name for name in timings if name not in also):
                self.results.add(f"{prefix}.{ours}_over_{peer}", ratio(timings[ours], timings[peer]), "x")

    def _transformer(self, config: MMDiTConfig) -> nn.Module:
        """diffusers' `SD3Transformer2DModel` of this shape, random weights made on the device."""
        import diffusers

        # Untyped in either case, so that checks give the same with diffusers installed and without.
        build: Any = diffusers.SD3Transformer2DModel
        with torch.device("meta"):
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
        model = model.to(self.dtype).to_empty(device=self.device).eval().requires_grad_(False)
        for name, tensor in model.state_dict().items():
            fill(name, tuple(tensor.shape), tensor)
        return model

    def _compiled(self, model: nn.Module) -> nn.Module:
        model.compile()
        return model

    def _torchao(self, model: nn.Module) -> nn.Module:
        ao: Any = importlib.import_module("torchao.quantization")

        # Rows of both factors have scales of their own; embedders and modulation stay, as torchao's own recipe has it.
        recipe = ao.Float8DynamicActivationFloat8WeightConfig(granularity=ao.PerRow())
        ao.quantize_(model, recipe, filter_fn=lambda module, name: isinstance(module, nn.Linear) and "blocks" in name)
        return self._compiled(model)

    def _layerwise(self, model: nn.Module) -> nn.Module:
        casting: Any = model
        casting.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=self.dtype)
        return model
