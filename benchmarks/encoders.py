"""Text encoders beside transformers', random weights of the true shapes, same tokens, in turns: T5-XXL and CLIP-G.

A few blocks are timed and the whole is said to be so many times as long: blocks are alike, and embeddings cost nothing.
Ours runs in float32, with FP8 weights (by row, as --force-fp8-text-encoders makes them) and with FP8 weights by --fast;
transformers runs in float32, as it comes, and once more inside our `whole_processor`.

    python -m benchmarks.encoders                          # two prompts of 77 tokens, 2 threads
    python -m benchmarks.encoders --threads 1 --blocks 1   # processor seconds, the fairer measure beside other work
"""

import argparse
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import Timing, interleave, ratio, report
from octavo.checkpoint.force import forced_specs
from octavo.devices import whole_processor
from octavo.fp8 import Fp8Linear, Mode, prepare, quantize
from octavo.models import ClipConfig, ClipTextEncoder, T5Config, T5Encoder
from octavo.quantize import convert

WORDS = 1000  # of the vocabulary: a table costs nothing but memory
FP8: Mapping[str, Mode] = {"octavo_fp8": "exact", "octavo_fast": "fast"}
ENCODERS = {"t5xxl": 24, "clip_g": 32}  # blocks of the whole


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    clock = time.thread_time if options.threads == 1 else time.perf_counter
    for encoder in options.only:
        tokens = torch.randint(WORDS, (2, 77), generator=torch.Generator().manual_seed(1))
        steps = make_steps(encoder, options.blocks, tokens)
        made = {name: step() for name, step in steps.items()}  # warms up, too
        timings = interleave(steps, warmup=0, repeats=options.repeats, clock=clock)
        times = ENCODERS[encoder] / options.blocks
        conditions = {"shape": "2x77 tokens", "blocks": options.blocks, "clock": clock.__name__}
        for name, timing in timings.items():
            error = float((made[name] - made["transformers"]).norm() / made["transformers"].norm())
            whole = Timing(tuple(times * seconds for seconds in timing.seconds))
            facts = {"relative_difference": float(f"{error:.3g}"), **conditions}
            report(f"{encoder}.{name}", "s", whole, what=f"{ENCODERS[encoder]} blocks", **facts)
        for ours in (name for name in timings if name.startswith("octavo")):
            for peer in (name for name in timings if name.startswith("transformers")):
                compared = ratio(timings[ours], timings[peer])
                report(f"{encoder}.{ours}.ratio", f"{ours} / {peer}", compared, **conditions)


def make_steps(encoder: str, blocks: int, tokens: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Ours and transformers', all of the same weights."""
    model = _build(encoder, blocks)
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(weight, mean=float(name.endswith("weight")), std=0.1)
        elif weight.ndim == 2:
            nn.init.normal_(weight, std=1 / weight.shape[1] ** 0.5)
        else:
            nn.init.normal_(weight, std=0.05)
    peer = _transformers_step(encoder, model, tokens)
    steps = {
        "transformers": peer,
        "transformers_whole_processor": whole_processor()(peer),
        "octavo": _octavo_step(model, tokens),
    }
    for name, mode in FP8.items():
        steps[name] = _octavo_step(_in_fp8(encoder, blocks, model, mode), tokens)
    return steps


def _build(encoder: str, blocks: int) -> nn.Module:
    if encoder == "t5xxl":
        config = T5Config(width=4096, layers=blocks, heads=64, head_width=64, mlp_width=10240, vocab_size=WORDS)
        return T5Encoder(config).requires_grad_(False)
    shape: Any = {"width": 1280, "heads": 20, "mlp_width": 5120, "activation": "gelu", "projection": 1280}
    return ClipTextEncoder(ClipConfig(layers=blocks, vocab_size=WORDS, **shape)).requires_grad_(False)


def _in_fp8(encoder: str, blocks: int, model: nn.Module, mode: Mode) -> nn.Module:
    """The same with FP8 weights, as if loaded with --force-fp8-text-encoders."""
    with torch.device("meta"):
        twin = _build(encoder, blocks)
    kind: Any = "t5" if encoder == "t5xxl" else encoder
    linears = [name for name, module in twin.named_modules() if isinstance(module, nn.Linear)]
    convert(twin, forced_specs(linears, kind))
    weights = model.state_dict()
    for name, module in twin.named_modules():
        if isinstance(module, Fp8Linear):
            rounded = quantize(weights[f"{name}.weight"], granularity="row")
            module.q, module.scale = rounded.q, rounded.scale
        for own, _ in list(module.named_parameters(recurse=False)):
            setattr(module, own, nn.Parameter(weights[f"{name}.{own}"], requires_grad=False))
    prepare(twin, "cpu", torch.float32, mode=mode)
    return twin


def _octavo_step(model: nn.Module, tokens: Tensor) -> Callable[[], Tensor]:
    end = torch.full((len(tokens),), tokens.shape[1] - 1)
    arguments: dict[str, Tensor] = {"end": end} if isinstance(model, ClipTextEncoder) else {}
    skip: dict[str, int] = {"clip_skip": 1} if arguments else {}  # every block, as transformers

    @whole_processor()
    def step() -> Tensor:
        made = model(tokens, **arguments, **skip)
        out: Tensor = made[0] if isinstance(made, tuple) else made
        return out

    return step


def _transformers_step(encoder: str, model: nn.Module, tokens: Tensor) -> Callable[[], Tensor]:
    """Its weights are views of ours."""
    import transformers

    library: Any = transformers
    if encoder == "t5xxl":
        config = library.T5Config(
            vocab_size=WORDS, d_model=4096, d_kv=64, d_ff=10240, num_heads=64,
            num_layers=len(model.encoder.block), feed_forward_proj="gated-gelu",  # type: ignore[union-attr,arg-type]
        )  # fmt: skip
        with torch.device("meta"):
            peer = library.T5EncoderModel(config)
        weights = dict(model.state_dict())
        if any(key == "encoder.embed_tokens.weight" for key in peer.state_dict()):
            weights["encoder.embed_tokens.weight"] = weights["shared.weight"]
    else:
        config = library.CLIPTextConfig(
            vocab_size=WORDS, hidden_size=1280, intermediate_size=5120, num_attention_heads=20, hidden_act="gelu",
            num_hidden_layers=len(model.text_model.encoder.layers), eos_token_id=2,  # type: ignore[union-attr,arg-type]
        )  # fmt: skip
        peer = library.CLIPTextModel(config)
        theirs, ours = peer.state_dict(), model.state_dict()
        weights = {key: ours.get(key, ours.get(f"text_model.{key}", weight)) for key, weight in theirs.items()}
    peer.load_state_dict(weights, assign=True)
    peer.eval()

    def step() -> Tensor:
        if encoder == "t5xxl":
            last: Tensor = peer(tokens).last_hidden_state
            return last
        hidden: Tensor = peer(tokens, output_hidden_states=True).hidden_states[-1]
        return hidden

    return step


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=tuple(ENCODERS), default=tuple(ENCODERS))
    return parser.parse_args()


if __name__ == "__main__":
    main()
