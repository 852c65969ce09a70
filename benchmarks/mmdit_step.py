"""One step of SD3.5 Medium's MMDiT beside diffusers' `SD3Transformer2DModel`: same weights, same inputs, in turns.

A step is everything from latents to velocity, the modulation included. In a run we make the modulation of all steps in
one call before the first; what that costs, for one step and for a whole run, has lines of its own. The weights are
random. Ours runs in float32, with FP8 weights (by row, as --force-fp8 makes them) and with FP8 weights by --fast.

diffusers runs as it comes, and once more inside our `whole_processor`, which tells what of a difference is the
arithmetic of the processor and what the model. Peak memory is taken in a process of its own for each, which never holds
more than its own model.

    python -m benchmarks.mmdit_step                  # 256×256 px, 154 text tokens, batch 2, float32, 2 threads
    python -m benchmarks.mmdit_step --threads 1      # processor seconds, the fairer measure beside other work
    python -m benchmarks.mmdit_step --depth 4        # a quick look at a few blocks
    python -m benchmarks.mmdit_step --only octavo_fp8 octavo_fast diffusers
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import in_own_process, interleave, measure, peak_memory, ratio, report
from octavo.checkpoint.force import forced_specs
from octavo.devices import whole_processor
from octavo.evaluate.bench_peers import diffusers_transformer
from octavo.fp8 import Fp8Linear, Mode, prepare, quantize
from octavo.models import MMDiT, MMDiTConfig
from octavo.quantize import convert

RUN_STEPS = 28  # a usual number for Medium
FP8: Mapping[str, Mode] = {"octavo_fp8": "exact", "octavo_fast": "fast"}
VARIANTS = ("diffusers", "diffusers_whole_processor", "octavo", *FP8)


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
    inputs = random_inputs(options)
    steps = dict(make_steps(options, inputs))
    velocities = {name: step() for name, step in steps.items()}  # warms up, too
    timings = interleave(steps, warmup=0, repeats=options.repeats, clock=clock)
    reference = next((name for name in VARIANTS if name in velocities), None)
    assert reference is not None
    for name, timing in timings.items():
        error = float((velocities[name] - velocities[reference]).norm() / velocities[reference].norm())
        report(f"mmdit_step.{name}", "s", timing, relative_difference=float(f"{error:.3g}"), **conditions)
    for ours in (name for name in timings if name.startswith("octavo")):
        for peer in (name for name in timings if name.startswith("diffusers")):
            report(f"mmdit_step.{ours}.ratio", f"{ours} / {peer}", ratio(timings[ours], timings[peer]), **conditions)
    del steps

    for name in [name for name in ("octavo", *FP8) if name in timings]:
        mmdit = _model(name, options)
        for count in (1, RUN_STEPS):
            pooled = inputs.pooled.repeat(count, 1)
            make = whole_processor()(partial(mmdit.modulation, torch.linspace(1000, 1, len(pooled)), pooled))
            modulation = measure(make, warmup=1, repeats=3, clock=clock)
            report(f"mmdit_step.{name}.modulation", "s", modulation, steps=count, **conditions)
        del mmdit, make

    names = [name for name in timings if name != "diffusers_whole_processor"]
    weighed = {name: in_own_process("benchmarks.mmdit_step", _forward(options, name)) for name in names}
    for name, bytes in weighed.items():
        beside = (bytes["peak"] - bytes["weights"]) / 1e9
        report(f"mmdit_memory.{name}", "GB", bytes["peak"] / 1e9, beside_weights=round(beside, 3), **conditions)
    for name in names:
        if name != "diffusers" and "diffusers" in weighed:
            share = weighed[name]["peak"] / weighed["diffusers"]["peak"]
            report(f"mmdit_memory.{name}.ratio", f"{name} / diffusers", share, **conditions)


def make_steps(options: argparse.Namespace, inputs: Inputs) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """The variants that are asked for; those in float32 share their weights."""
    wide = [name for name in options.only if name not in FP8]
    mmdit = random_mmdit(options.depth) if wide else None
    for name in options.only:
        if name in FP8:
            yield name, octavo_step(fp8_mmdit(options.depth, FP8[name]), inputs)
        else:
            assert mmdit is not None
            yield name, _step(name, mmdit, inputs)


def _model(name: str, options: argparse.Namespace) -> MMDiT:
    return fp8_mmdit(options.depth, FP8[name]) if name in FP8 else random_mmdit(options.depth)


def _step(name: str, mmdit: MMDiT, inputs: Inputs) -> Callable[[], Tensor]:
    if name.startswith("octavo"):
        return octavo_step(mmdit, inputs)
    step = diffusers_step(as_diffusers(mmdit), inputs)
    return whole_processor()(step) if name == "diffusers_whole_processor" else step


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
    mmdit = _on_meta(depth)
    mmdit.to_empty(device="cpu")
    tile = _tile()
    for weight in mmdit.parameters():
        _fill(weight, tile).mul_(_gain(weight))
    return mmdit


def fp8_mmdit(depth: int, mode: Mode) -> MMDiT:
    """The same in FP8, as if loaded from a file: no weight is ever there in more bits, and nothing is left behind.

    The table of positions is in float16, as in the released file.
    """
    mmdit, tile = _on_meta(depth), _tile()
    codes = quantize(tile)
    linears = [name for name, module in mmdit.named_modules() if isinstance(module, nn.Linear)]
    convert(mmdit, forced_specs(linears, "mmdit"))
    for module in mmdit.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            dtype = torch.float16 if name == "pos_embed" else torch.float32
            new = _fill(torch.empty(weight.shape, dtype=dtype), tile).mul_(_gain(weight))
            setattr(module, name, nn.Parameter(new, requires_grad=False))
        if isinstance(module, Fp8Linear):
            module.q = _fill(torch.empty(module.q.shape, dtype=codes.q.dtype), codes.q)
            module.scale = (codes.scale / math.sqrt(module.in_features)).expand(module.out_features, 1).contiguous()
    assert not any(tensor.is_meta for tensor in mmdit.state_dict().values())
    prepare(mmdit, "cpu", torch.float32, mode=mode)
    return mmdit


def _on_meta(depth: int) -> MMDiT:
    medium = MMDiTConfig.medium()
    dual = tuple(i for i in medium.dual_attention if i < depth)
    with torch.device("meta"):
        return MMDiT(replace(medium, depth=depth, dual_attention=dual))


def _tile() -> Tensor:
    """One drawn tile serves all weights: values hardly matter to time, and billions take a while to draw."""
    return torch.randn(1 << 22, generator=torch.Generator().manual_seed(0))


def _fill(weight: Tensor, tile: Tensor) -> Tensor:
    for start in range(0, weight.numel(), len(tile)):
        part = weight.view(-1)[start : start + len(tile)]
        part.copy_(tile[: len(part)])
    return weight


def _gain(weight: Tensor) -> float:
    return 1 / math.sqrt(weight[0].numel())


def as_diffusers(mmdit: MMDiT) -> nn.Module:
    """diffusers' model of the same shape, its weights views of ours, so that both fit into memory at once."""
    with torch.device("meta"):
        peer = diffusers_transformer(mmdit.config)
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
    mmdit, inputs = _model(options.weigh, options), random_inputs(options)
    weights = 0
    for tensor in mmdit.state_dict().values():  # of a twin, the FP8 weight whose place it takes, byte for byte
        weights += tensor.nbytes
    step = _step(options.weigh, mmdit, inputs)
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
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=VARIANTS, help="these variants")
    parser.add_argument("--weigh", choices=VARIANTS, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
