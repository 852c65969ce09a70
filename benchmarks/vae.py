"""The VAE of SD3.5 beside diffusers' `AutoencoderKL`: same random weights, same latents and pixels, in turns.

Ours runs as `VAE.decode` and `VAE.encode` do, by rows where a picture is large, and once more whole, as the definition
is written. diffusers runs as it comes. Peak memory is taken in a process of its own for each.

    python -m benchmarks.vae                              # 256x256 and 512x512 pixels, float32, 2 threads
    python -m benchmarks.vae --threads 1 --sizes 512      # processor seconds, the fairer measure beside other work
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import in_own_process, interleave, peak_memory, ratio, report
from octavo.devices import whole_processor
from octavo.models import VAE, VAEConfig

VARIANTS = ("diffusers", "octavo", "octavo_whole")
DIRECTIONS = ("decode", "encode")


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    if options.weigh:
        variant, direction, size = options.weigh
        step = make_steps(random_vae(), direction, int(size), (variant,))[variant]
        before = peak_memory()
        step()
        print(json.dumps({"before": before, "peak": peak_memory()}))
        return

    clock = time.thread_time if options.threads == 1 else time.perf_counter
    vae = random_vae()
    for direction in options.directions:
        for size in options.sizes:
            conditions = {"shape": f"1x3x{size}x{size}", "dtype": "float32", "clock": clock.__name__}
            steps = make_steps(vae, direction, size, options.only)
            made = {name: step() for name, step in steps.items()}  # warms up, too
            timings = interleave(steps, warmup=0, repeats=options.repeats, clock=clock)
            for name, timing in timings.items():
                apart = float((made[name] - made[options.only[0]]).abs().max())
                report(f"vae_{direction}.{name}", "s", timing, largest_difference=float(f"{apart:.2g}"), **conditions)
            for peer in (name for name in timings if name != "octavo" and "octavo" in timings):
                compared = ratio(timings["octavo"], timings[peer])
                report(f"vae_{direction}.octavo.ratio", f"octavo / {peer}", compared, **conditions)
            if options.no_memory:
                continue
            for name in timings:
                words = ["--weigh", name, direction, str(size), "--threads", str(options.threads)]
                bytes = in_own_process("benchmarks.vae", words)
                beside = (bytes["peak"] - bytes["before"]) / 1e9
                report(f"vae_{direction}_memory.{name}", "GB", beside, what="beside the weights", **conditions)


def random_vae() -> VAE:
    """SD3.5's VAE, weights scaled so that activations keep their size."""
    torch.manual_seed(0)
    vae = VAE(VAEConfig())
    for name, weight in vae.named_parameters():
        if weight.ndim == 4:
            nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
        elif "norm" in name:
            nn.init.normal_(weight, mean=float(name.endswith("weight")), std=0.1)
    return vae.requires_grad_(False)


def make_steps(vae: VAE, direction: str, size: int, names: tuple[str, ...]) -> dict[str, Callable[[], Tensor]]:
    """The variants that are asked for; all share their weights."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 16, size // 8, size // 8, generator=generator)
    if direction == "encode":
        x = torch.rand(1, 3, size, size, generator=generator) * 2 - 1
    steps: dict[str, Callable[[], Tensor]] = {}
    for name in names:
        if name == "diffusers":
            steps[name] = _diffusers_step(as_diffusers(vae), direction, x)
        else:
            by_rows = name == "octavo"
            steps[name] = _octavo_step(vae, direction, x, by_rows=by_rows)
    return steps


def _octavo_step(vae: VAE, direction: str, x: Tensor, *, by_rows: bool) -> Callable[[], Tensor]:
    half: Any = getattr(vae, direction if by_rows else f"{direction}r")  # `vae.decoder` is the definition

    @whole_processor()
    def step() -> Tensor:
        out: Tensor = half(x)
        return out

    return step


def _diffusers_step(peer: Any, direction: str, x: Tensor) -> Callable[[], Tensor]:
    def step() -> Tensor:
        out: Tensor = peer.decode(x).sample if direction == "decode" else peer.encode(x).latent_dist.parameters
        return out

    return step


def as_diffusers(vae: VAE) -> nn.Module:
    """diffusers' model of the same shape, its weights views of ours."""
    import diffusers

    build: Any = diffusers.AutoencoderKL  # type: ignore[attr-defined,unused-ignore]
    config = vae.config
    with torch.device("meta"):
        peer: nn.Module = build(
            block_out_channels=config.channels,
            down_block_types=["DownEncoderBlock2D"] * len(config.channels),
            up_block_types=["UpDecoderBlock2D"] * len(config.channels),
            layers_per_block=config.layers_per_block,
            latent_channels=config.latent_channels,
            norm_num_groups=config.groups,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
    peer.load_state_dict({_diffusers_key(key): weight for key, weight in _weights(vae)}, assign=True)
    return peer.eval()


def _weights(vae: VAE) -> list[tuple[str, Tensor]]:
    def flat(key: str, weight: Tensor) -> Tensor:
        """diffusers has the attention's 1x1 convolutions as linear layers."""
        return weight.flatten(1) if "attn_1" in key and weight.ndim == 4 else weight

    return [(key, flat(key, weight)) for key, weight in vae.state_dict().items()]


ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def _diffusers_key(key: str) -> str:
    half, *words = key.split(".")
    match words:
        case [("down" | "up") as side, level, "block", block, *rest]:
            at = int(level) if side == "down" else len(VAEConfig().channels) - 1 - int(level)
            words = [f"{side}_blocks", str(at), "resnets", block, *rest]
        case [("down" | "up") as side, level, sampler, *rest]:
            at = int(level) if side == "down" else len(VAEConfig().channels) - 1 - int(level)
            words = [f"{side}_blocks", str(at), f"{sampler}rs", "0", *rest]
        case ["mid", "attn_1", layer, *rest]:
            words = ["mid_block", "attentions", "0", ATTENTION[layer], *rest]
        case ["mid", block, *rest]:
            words = ["mid_block", "resnets", str(int(block[-1]) - 1), *rest]
        case ["norm_out", *rest]:
            words = ["conv_norm_out", *rest]
    words = ["conv_shortcut" if word == "nin_shortcut" else word for word in words]
    return ".".join([half, *words])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512], help="sides of the pictures, in pixels")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--directions", nargs="+", choices=DIRECTIONS, default=DIRECTIONS)
    parser.add_argument("--no-memory", action="store_true", help="leave peak memory out")
    parser.add_argument("--weigh", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
