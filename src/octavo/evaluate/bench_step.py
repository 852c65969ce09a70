"""One step of the transformer: latents to velocity, the modulation's table being there, as in every step of a run.

Each variant is a model of its own, loaded the way `octavo generate` loads it: its weights in 16 or 32 bits, in FP8, or
in FP8 by `--fast`; called one kernel after the other (eager), by CUDA graphs, or compiled. All run in turns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from octavo.devices import whole_processor
from octavo.evaluate.bench_ceilings import Ceilings
from octavo.evaluate.bench_costs import step_work, weight_bytes
from octavo.evaluate.bench_kernels import distance, rounded_to
from octavo.evaluate.bench_models import Wanted, open_model, require_room
from octavo.evaluate.bench_results import Results
from octavo.evaluate.bench_timing import NEVER, Deadline, Timing, interleave, wait_for_device
from octavo.fp8 import Fp8Linear
from octavo.fp8.needs import dtype_name
from octavo.models import MMDiT, MMDiTConfig
from octavo.models.ops import PLAIN, PlainOps, each_with_ops, use_ops
from octavo.placement.graphs import captured_by, through

RELEASED_TOKENS = 333  # 77 of CLIP and 256 of T5, as the released models were trained


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a step is given; B rows."""

    latents: Tensor  # [B, 16, h, w]
    context: Tensor  # [B, L, context width]
    timestep: Tensor  # [B]
    pooled: Tensor  # [B, pooled width]

    def to(self, device: torch.device, dtype: torch.dtype) -> Inputs:
        """The same elsewhere."""
        latents, context, pooled = (each.to(device, dtype) for each in (self.latents, self.context, self.pooled))
        return Inputs(latents, context, self.timestep.to(device), pooled)


def draw_inputs(config: MMDiTConfig, batch: int, height: int, width: int, tokens: int) -> Inputs:
    """Random ones on the CPU, in float32."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return Inputs(
        draw(batch, config.in_channels, height, width),
        draw(batch, tokens, config.context_width),
        torch.linspace(900, 300, batch),
        draw(batch, config.pooled_width),
    )


@dataclass(slots=True)
class Step:
    """A variant that is ready to run."""

    wanted: Wanted
    mmdit: MMDiT
    run: Callable[[], Tensor]
    linear: str  # dtype in which most of its products with weights are made
    stored: str  # that of the weights

    @property
    def bytes(self) -> int:
        """Of weights that a step reads: all but those of the modulation and the unused rest of the positions."""
        left_out = [module for name, module in self.mmdit.named_modules() if name.endswith("adaLN_modulation")]
        table = self.mmdit.pos_embed.nbytes
        return weight_bytes(self.mmdit) - table - sum(weight_bytes(module) for module in left_out)


def bench_step(
    variants: Mapping[str, Wanted],
    ceilings: Ceilings,
    results: Results,
    *,
    batch: int,
    height: int,
    width: int,
    tokens: int,
    repeats: int = 10,
    deadline: Deadline = NEVER,
    also: Mapping[str, tuple[Callable[[], object], str]] | None = None,
) -> dict[str, Timing]:
    """A line for each variant, with its share of the ceiling and how far its velocity is from the first one's.

    Args:
        variants: by the end of the line's name; the first is the reference.
        height, width: of the latents.
        also: peers that run in the same turns: by name, the call and the dtype of its products.

    Returns:
        Timings by variant and peer.
    """
    steps = dict[str, Step]()
    prefix = f"step.{next(iter(variants.values())).name}"
    for name, wanted in variants.items():
        with results.guarded(f"{prefix}.{name}"):
            for end, step in make_steps(wanted, batch, height, width, tokens):
                steps[name + end] = step
    if not steps:
        return {}
    device, config = next(iter(variants.values())).device, next(iter(steps.values())).mmdit.config
    work = step_work(config, batch, height, width, tokens)
    every: dict[str, Callable[[], object]] = {name: step.run for name, step in steps.items()}
    every |= {name: run for name, (run, _) in (also or {}).items()}
    runs, velocities = dict[str, Callable[[], object]](), dict[str, Tensor]()
    with torch.inference_mode(), whole_processor():
        for name, run in every.items():
            with results.guarded(f"{prefix}.{name}"):
                out = run()
                wait_for_device()
                if isinstance(out, Tensor):
                    velocities[name] = out.float().cpu()
                runs[name] = run  # only what has run once goes into the rounds
        warmup = 2 if device.type == "cuda" else 0  # graphs are captured meanwhile
        timings = interleave(runs, warmup=warmup, repeats=repeats, deadline=deadline)
    reference = velocities.get(next(iter(steps)))
    for name, timing in timings.items():
        told: dict[str, Any] = {"batch": batch, "latents": [height, width], "text_tokens": tokens}
        if name in steps:
            step = steps[name]
            linear, other = step.linear, dtype_name(step.wanted.dtype)
            bound = ceilings.seconds(work, linear=linear, other=other, nbytes=step.bytes)
            told |= {"weights": step.stored, "products": linear, "teraflop": round(work.total / 1e12, 3)}
            if reference is not None and name in velocities:
                told["relative_difference"] = float(f"{distance(velocities[name], reference):.3g}")
        else:
            linear = other = (also or {})[name][1]
            bound = ceilings.seconds(work, linear=linear, other="bfloat16" if linear == "e4m3fn" else other)
            told |= {"products": linear}
        results.add(f"{prefix}.{name}", timing, bound=bound, conditions=told)
    return timings


def make_steps(wanted: Wanted, batch: int, height: int, width: int, tokens: int) -> Iterator[tuple[str, Step]]:
    """Load the model and make its table of modulation; gives the step as a run takes it (under the name ""), and where
    that is by CUDA graphs or fused kernels, also those without."""
    components = open_model(wanted)
    require_room([components.mmdit])
    mmdit = components.mmdit()
    inputs = draw_inputs(mmdit.config, batch, height, width, tokens).to(wanted.device, wanted.dtype)
    with torch.inference_mode(), whole_processor():
        table = mmdit.modulation(inputs.timestep, inputs.pooled)
    ways = [
        rounded_to(module.choice.backend, wanted.dtype)
        for module in mmdit.joint_blocks.modules()  # type: ignore[attr-defined]  # a ModuleList, told as a sequence
        if isinstance(module, Fp8Linear) and module.choice is not None and not module.spec.full_precision
    ]
    linear = max(set(ways), key=ways.count) if ways else dtype_name(wanted.dtype)
    stored = "float8" if ways else dtype_name(wanted.dtype)

    def step(call: Callable[..., Tensor]) -> Step:
        return Step(wanted, mmdit, partial(call, inputs.latents, inputs.context, table), linear, stored)

    def unfused(*given: Any) -> Tensor:
        parts = each_with_ops(mmdit)
        fused = [part.ops for part in parts]
        use_ops(mmdit, PLAIN)
        try:
            velocity: Tensor = mmdit(*given)
            return velocity
        finally:
            for part, ops in zip(parts, fused, strict=True):
                part.ops = ops

    yield "", step(through(mmdit))
    if captured_by(mmdit) is not None:
        yield "_eager", step(mmdit)
    if not all(isinstance(part.ops, PlainOps) for part in each_with_ops(mmdit)):
        yield "_eager_unfused", step(unfused)


def variants_here(wanted: Wanted) -> dict[str, Wanted]:
    """The variants that make sense on a device: weights as they are, in FP8, and in FP8 by `--fast`."""
    return {
        dtype_name(wanted.dtype): replace(wanted, fp8=False, fast=False),
        "fp8": replace(wanted, fp8=True, fast=False),
        "fp8_fast": replace(wanted, fp8=True, fast=True),
    }
