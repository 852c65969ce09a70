"""FP8 linear layers beside float32's, in time and memory.

Shapes are those of SD3.5 Medium at 256×256 px, of its modulation, and of T5-XXL. Each backend that this machine has
runs in turns with F.linear, as torch runs it by default and inside our `whole_processor`; the figures are its time over
the former's, and the bytes of its weight over float32's. A slice of T5-XXL follows, one block at full width, in FP8 and
in FP8 by --fast, beside float32 in both ways.

    python -m benchmarks.fp8_linear                # 2 threads, wall clock
    python -m benchmarks.fp8_linear --threads 1    # processor seconds, the fairer measure beside other work
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import Run, interleave, ratio, report
from octavo.devices import whole_processor
from octavo.fp8 import BACKENDS, E4M3FN, Fp8Linear, LinearSpec, Mode, Problem, prepare, quantize
from octavo.models import T5Config, T5Encoder
from octavo.quantize import convert


@dataclass(frozen=True, slots=True)
class Shape:
    """x [M, K] times a weight [N, K]."""

    what: str
    M: int
    K: int
    N: int


SHAPES = (
    Shape("fc1 of Medium", 820, 1536, 6144),
    Shape("fc2 of Medium", 820, 6144, 1536),
    Shape("qkv of Medium", 820, 1536, 4608),
    Shape("proj of Medium", 820, 1536, 1536),
    Shape("modulation of Medium, one step", 2, 1536, 9216),
    Shape("wi of T5-XXL, two prompts", 154, 4096, 10240),
)
Clock = Callable[[], float]
T5_XXL = {"width": 4096, "heads": 64, "head_width": 64, "mlp_width": 10240}


def linears(repeats: int, clock: Clock) -> None:
    """One line for each shape and backend."""
    for shape in SHAPES:
        x, weight = torch.randn(shape.M, shape.K), torch.randn(shape.N, shape.K) * shape.K**-0.5
        scaled = quantize(weight, E4M3FN, "row")
        problem = Problem(
            N=shape.N, K=shape.K, format=E4M3FN, granularity="row", dtype=x.dtype, device="cpu", mode="fast"
        )
        runs: dict[str, Run] = {"float32": partial(F.linear, x, weight), "whole": partial(_whole, x, weight)}
        exact = F.linear(x, weight)
        errors = {"whole": _distance(_whole(x, weight), exact)}
        for backend in BACKENDS:
            if backend.refusal(problem) is None:
                ready = scaled if backend.twin is None else backend.twin(scaled)
                runs[backend.name] = partial(backend.run, x, ready, None, None)
                errors[backend.name] = _distance(backend.run(x, ready, None, None), exact)
        fp8_bytes = scaled.q.nbytes + scaled.scale.nbytes
        timings = interleave(runs, warmup=1, repeats=repeats, clock=clock)
        for name, error in errors.items():
            report(
                "fp8_linear",
                "time / float32 F.linear",
                ratio(timings[name], timings["float32"]),
                backend=name,
                what=shape.what,
                shape=[shape.M, shape.K, shape.N],
                relative_error=float(f"{error:.3g}"),
                weight_bytes_over_float32=1.0 if name == "whole" else round(fp8_bytes / weight.nbytes, 4),
            )


def _whole(x: Tensor, weight: Tensor) -> Tensor:
    with whole_processor():
        return F.linear(x, weight)


def _distance(y: Tensor, exact: Tensor) -> float:
    return float((y - exact).norm() / exact.norm())


def t5(repeats: int, clock: Clock) -> None:
    """One block of T5-XXL, two prompts of 77 tokens: FP8, exact and fast, over float32."""
    config = T5Config(layers=1, vocab_size=1000, **T5_XXL)
    wide = T5Encoder(config)
    names = [name for name, module in wide.named_modules() if isinstance(module, nn.Linear)]
    tokens = torch.randint(1000, (2, 77))
    runs: dict[str, Run] = {"float32": lambda: wide(tokens), "whole": whole_processor()(lambda: wide(tokens))}
    exact, taken, errors, held, in_float32 = wide(tokens), dict[str, str](), dict[str, float](), 0, 0
    modes: dict[str, Mode] = {"fp8": "exact", "fast": "fast"}
    for name, mode in modes.items():
        small = T5Encoder(config)
        small.load_state_dict(wide.state_dict())
        convert(small, dict.fromkeys(names, LinearSpec(granularity="row")))
        layers = [module for module in small.modules() if isinstance(module, Fp8Linear)]
        held = sum(layer.q.nbytes + layer.scale.nbytes for layer in layers)
        in_float32 = sum(4 * layer.q.numel() for layer in layers)
        taken[name] = str(prepare(small, "cpu", torch.float32, mode=mode))
        runs[name] = partial(small, tokens)
        errors[name] = _distance(small(tokens), exact)
    timings = interleave(runs, warmup=1, repeats=repeats, clock=clock)
    for name, paths in taken.items():
        for peer in ("float32", "whole"):
            report(
                f"{name}_t5_block",
                f"time / {peer}",
                ratio(timings[name], timings[peer]),
                paths=paths,
                relative_error=float(f"{errors[name]:.3g}"),
                linear_bytes_over_float32=round(held / in_float32, 4),
            )


def main() -> None:
    """Print one JSON line for each figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", choices=("linears", "t5"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.thread_time if options.threads == 1 else time.perf_counter
    torch.manual_seed(0)
    with torch.inference_mode():
        if options.only != "t5":
            linears(options.repeats, clock)
        if options.only != "linears":
            t5(options.repeats, clock)


if __name__ == "__main__":
    main()
