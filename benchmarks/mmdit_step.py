"""One step of SD3.5 Medium's MMDiT beside diffusers' `SD3Transformer2DModel`: same weights, same inputs, in turns.

A step is everything from latents to velocity, the modulation included. In a run we make the modulation of all steps in
one call before the first; what that costs, for one step and for a whole run, has lines of its own. Peak memory is taken
in a process of its own for each. The weights are random.

diffusers runs as it comes, and once more inside our `whole_processor`, which tells what of a difference is the
arithmetic of the processor and what the model.

    python -m benchmarks.mmdit_step                  # 256×256 px, 154 text tokens, batch 2, float32, 2 threads
    python -m benchmarks.mmdit_step --threads 1      # processor seconds, the fairer measure beside other work
    python -m benchmarks.mmdit_step --depth 4        # a quick look at a few blocks
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import in_own_process, interleave, measure, peak_memory, ratio, report
from octavo.devices import whole_processor
from octavo.models import MMDiT, MMDiTConfig

RUN_STEPS = 28  # a usual number for Medium
WEIGHED = ("octavo", "diffusers")


@dataclass(frozen=True, slots=True)
class Inputs:
    """What one step is given; B rows."""

    latents: Tensor  # [B, 16, h, w]
    context: Tensor  # [B, L, 4096]
    pooled: Tensor  # [B, 2048]
    timestep: Tensor  # [B]


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    if options.weigh:
        print(json.dumps({"weights": _weigh(options), "peak": peak_memory()}))
        return

    clock = time.thread_time if options.threads == 1 else time.perf_counter
    conditions = {"shape": _shape(options), "dtype": "float32", "clock": clock.__name__}
    mmdit, inputs = random_mmdit(options.depth), random_inputs(options)
    peer = as_diffusers(mmdit)
    steps = {
        "octavo": octavo_step(mmdit, inputs),
        "diffusers": diffusers_step(peer, inputs),
        "diffusers_whole_processor": whole_processor()(diffusers_step(peer, inputs)),
    }
    velocities = {name: step() for name, step in steps.items()}  # warms up, too
    difference = (velocities["octavo"] - velocities["diffusers"]).abs().max().item()
    timings = interleave(steps, warmup=0, repeats=options.repeats, clock=clock)
    for name, timing in timings.items():
        report(f"mmdit_step.{name}", "s", timing, **conditions)
    for peer_name in ("diffusers", "diffusers_whole_processor"):
        versus = ratio(timings["octavo"], timings[peer_name])
        report("mmdit_step.ratio", f"octavo / {peer_name}", versus, largest_difference=difference, **conditions)

    for count in (1, RUN_STEPS):
        pooled = inputs.pooled.repeat(count, 1)
        make = whole_processor()(partial(mmdit.modulation, torch.linspace(1000, 1, len(pooled)), pooled))
        modulation = measure(make, warmup=1, repeats=3, clock=clock)
        report("mmdit_step.modulation", "s", modulation, steps=count, **conditions)
    del mmdit, peer, steps, make  # two more models are to come

    weighed = {name: in_own_process("benchmarks.mmdit_step", _forward(options, name)) for name in WEIGHED}
    for name, bytes in weighed.items():
        beside = (bytes["peak"] - bytes["weights"]) / 1e9
        report(f"mmdit_memory.{name}", "GB", bytes["peak"] / 1e9, beside_weights=round(beside, 3), **conditions)
    share = weighed["octavo"]["peak"] / weighed["diffusers"]["peak"]
    report("mmdit_memory.ratio", "octavo / diffusers", share, **conditions)


def octavo_step(mmdit: MMDiT, inputs: Inputs) -> Callable[[], Tensor]:
    @whole_processor()
    def step() -> Tensor:
        modulation = mmdit.modulation(inputs.timestep, inputs.pooled)
        velocity: Tensor = mmdit(inputs.latents, inputs.context, modulation)
        return velocity

    return step


def diffusers_step(peer: nn.Module, inputs: Inputs) -> Callable[[], Tensor]:
    def step() -> Tensor:
        velocity: Tensor = peer(
            hidden_states=inputs.latents,
            encoder_hidden_states=inputs.context,
            pooled_projections=inputs.pooled,
            timestep=inputs.timestep,
            return_dict=False,
        )[0]
        return velocity

    return step


def random_inputs(options: argparse.Namespace) -> Inputs:
    generator = torch.Generator().manual_seed(1)
    batch, side = options.batch, options.size // 8

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    timestep = torch.linspace(900, 300, batch)
    return Inputs(draw(batch, 16, side, side), draw(batch, options.tokens, 4096), draw(batch, 2048), timestep)


def random_mmdit(depth: int) -> MMDiT:
    """SD3.5 Medium with its first `depth` blocks, weights scaled so that activations keep their size."""
    medium = MMDiTConfig.medium()
    dual = tuple(i for i in medium.dual_attention if i < depth)
    with torch.device("meta"):
        mmdit = MMDiT(replace(medium, depth=depth, dual_attention=dual))
    mmdit.to_empty(device="cpu")
    # One drawn tile serves all weights: values hardly matter to time, and billions take a while to draw.
    tile = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0))
    for weight in mmdit.parameters():
        for start in range(0, weight.numel(), len(tile)):
            part = weight.view(-1)[start : start + len(tile)]
            part.copy_(tile[: len(part)])
        weight.mul_(1 / math.sqrt(weight[0].numel()))
    return mmdit


def as_diffusers(mmdit: MMDiT) -> nn.Module:
    """diffusers' model of the same shape, its weights views of ours, so that both fit into memory at once."""
    import diffusers

    # Untyped in either case, so that checks give the same with diffusers installed and without.
    build: Any = diffusers.SD3Transformer2DModel
    config = mmdit.config
    with torch.device("meta"):
        peer: nn.Module = build(
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
            qk_norm="rms_norm",
        )
    peer.load_state_dict(dict(_diffusers_weights(mmdit)), assign=True)
    return peer.eval()


OUTSIDE = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "context_embedder": "context_embedder",
    "final_layer.linear": "proj_out",
}
# Our name in a stream -> diffusers' name in a block, for the image and for the text stream.
LINEARS = {
    "attn.proj": ("attn.to_out.0", "attn.to_add_out"),
    "attn2.proj": ("attn2.to_out.0",),
    "attn.ln_q": ("attn.norm_q", "attn.norm_added_q"),
    "attn.ln_k": ("attn.norm_k", "attn.norm_added_k"),
    "attn2.ln_q": ("attn2.norm_q",),
    "attn2.ln_k": ("attn2.norm_k",),
    "mlp.fc1": ("ff.net.0.proj", "ff_context.net.0.proj"),
    "mlp.fc2": ("ff.net.2", "ff_context.net.2"),
    "adaLN_modulation.1": ("norm1.linear", "norm1_context.linear"),
}
QKV = {
    "attn.qkv": (("attn.to_q", "attn.to_k", "attn.to_v"), ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")),
    "attn2.qkv": (("attn2.to_q", "attn2.to_k", "attn2.to_v"),),
}


def _diffusers_weights(mmdit: MMDiT) -> Iterator[tuple[str, Tensor]]:
    ours = mmdit.state_dict()
    last = f"joint_blocks.{mmdit.config.depth - 1}.context_block.adaLN_modulation.1"
    yield "pos_embed.pos_embed", ours.pop("pos_embed")
    for key, weight in ours.items():
        name, _, kind = key.rpartition(".")
        if name in OUTSIDE:
            yield f"{OUTSIDE[name]}.{kind}", weight
        elif name == "final_layer.adaLN_modulation.1":
            yield f"norm_out.linear.{kind}", _scale_first(weight)
        else:
            _, block, stream, part = name.split(".", 3)
            side = ("x_block", "context_block").index(stream)
            prefix = f"transformer_blocks.{block}"
            if part in QKV:
                for target, third in zip(QKV[part][side], weight.chunk(3), strict=True):
                    yield f"{prefix}.{target}.{kind}", third
            else:
                yield f"{prefix}.{LINEARS[part][side]}.{kind}", _scale_first(weight) if name == last else weight


def _scale_first(weight: Tensor) -> Tensor:
    """Where only shift and scale are made, diffusers has them the other way round."""
    shift, scale = weight.chunk(2)
    return torch.cat([scale, shift])


def _weigh(options: argparse.Namespace) -> int:
    """Take a step of one model, alone in this process; returns the bytes of its weights."""
    mmdit, inputs = random_mmdit(options.depth), random_inputs(options)
    weights = sum(weight.nbytes for weight in mmdit.parameters())
    step = octavo_step(mmdit, inputs) if options.weigh == "octavo" else diffusers_step(as_diffusers(mmdit), inputs)
    del mmdit
    step()
    return weights


def _shape(options: argparse.Namespace) -> dict[str, Any]:
    return {"depth": options.depth, "pixels": options.size, "text_tokens": options.tokens, "batch": options.batch}


def _forward(options: argparse.Namespace, weigh: str) -> list[str]:
    names = ("depth", "size", "tokens", "batch", "threads")
    return [f"--weigh={weigh}", *(f"--{name}={getattr(options, name)}" for name in names)]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=24, help="blocks; SD3.5 Medium has 24")
    parser.add_argument("--size", type=int, default=256, help="pixels along a side")
    parser.add_argument("--tokens", type=int, default=154, help="text tokens")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--weigh", choices=WEIGHED, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
