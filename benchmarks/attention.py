"""How far each way to attend is from attention in float32, and on a GPU how long it takes.

    python -m benchmarks.attention                        # errors on what the embedded model attends to, and pictures
    python -m benchmarks.attention --device cuda --times  # errors of all that the GPU can do, and times at true shapes

Errors are relative (norm of the difference over norm of the result), of every block at every step of some pictures by
the embedded model, a trained one whose queries and keys are normalised as SD3.5's are; and of as many tokens as a
picture of 1024×1024 has, drawn at random and normalised alike. Times are of SD3.5's shapes; the share of the ceiling is
that of a matrix product of 8192×8192×8192 in the same run, in bfloat16 for all ways alike.
"""

import argparse
import math
from dataclasses import replace
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import Run, interleave, measure, ratio, report
from octavo.fp8.attention import exact_attention
from octavo.fp8.backends import UnusableError
from octavo.models.ops import PlainOps, use_ops
from octavo.pipeline.assemble import load
from octavo.pipeline.generate import generate
from octavo.pipeline.request import GenerateRequest
from octavo.placement.attention import ATTENTION_BACKENDS, AttentionBackend, Case, seconds

PROMPTS = ("a large red star on a blue background", "three green circles", "a small yellow heart on a white background")
SIDE = 8192  # of the product that is taken for the ceiling
TOKENS = 4096 + 333  # of 1024×1024 and of text
SHAPES = {
    "large": Case(dtype=torch.bfloat16, device="cuda"),
    "medium": Case(heads=24, dtype=torch.bfloat16, device="cuda"),
    "medium, image alone": Case(heads=24, queries=4096, keys=4096, dtype=torch.bfloat16, device="cuda"),
}
Heads = tuple[Tensor, Tensor, Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--times", action="store_true", help="time the shapes of SD3.5; needs a CUDA device")
    parser.add_argument("--tiles", action="store_true", help="time our kernel's tiles, too")
    parser.add_argument("--no-pictures", action="store_true", help="leave the pictures' differences out")
    given = parser.parse_args()
    device = torch.device(given.device)
    half = torch.bfloat16
    case = replace(Case(dtype=half, device=""), by_name=True).on(device)
    ways = [way for way in ATTENTION_BACKENDS if way.refusal(case) is None]

    real = recorded()
    drawn = [normalised(TOKENS, seed) for seed in range(2)]
    for name, inputs in (("embedded model", real), ("random, normalised", drawn)):
        for way in ways:
            errors = [error(way, each, device, half) for each in inputs]
            report(
                "attention_error", "relative", median(errors), way=way.name, worst=float(f"{max(errors):.4g}"),
                inputs=name, calls=len(errors), dtype="bfloat16", on=str(device),
            )  # fmt: skip
    if not given.no_pictures:
        pictures()
    if given.times:
        times(ways, device, tiles=given.tiles)


def recorded() -> list[Heads]:
    """Queries, keys and values of every block at every step, from the embedded model in float32."""
    components, found = load(device="cpu"), list[Heads]()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found.append((q.clone(), k.clone(), v.clone()))
        return exact_attention(q, k, v)

    use_ops(components.mmdit(), PlainOps(attend))
    for seed, prompt in enumerate(PROMPTS):
        generate(components, GenerateRequest(prompt=prompt, seed=seed, steps=8))
    return found


def normalised(tokens: int, seed: int) -> Heads:
    """Two heads as qk-norm leaves them: rows of length √64, which share a direction among keys, times a weight."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, tokens, 2, 64, generator=generator) for _ in range(3))
    weight = torch.rand(64, generator=generator) + 0.5
    common = torch.randn(64, generator=generator)
    return F.rms_norm(q, (64,)) * weight, F.rms_norm(k + common, (64,)) * weight, v


def error(
    way: AttentionBackend, inputs: tuple[Tensor, Tensor, Tensor], device: torch.device, dtype: torch.dtype
) -> float:
    """Of one call with its inputs in `dtype`, which all ways are given alike."""
    q, k, v = (x.to(device, dtype) for x in inputs)
    expected = exact_attention(*inputs)
    with torch.inference_mode():
        out = way.run(q, k, v).float().cpu()
    return float((out - expected).norm() / expected.norm())


def pictures() -> None:
    """How far pictures of the embedded model go from those by the definition: float32 but for what is rounded."""
    exact = drawn_by(None)
    for name in ("plain-fp8", "plain-int8-fp8", "plain-int8"):
        ratios = [psnr(a, b) for a, b in zip(drawn_by(name), exact, strict=True)]
        report("attention_picture", "dB PSNR", median(ratios), way=name, worst=float(f"{min(ratios):.4g}"))


def drawn_by(attention: str | None) -> list[Tensor]:
    """Pictures as numbers."""
    import numpy

    components = load(device="cpu", attention=attention)
    made = [
        generate(components, GenerateRequest(prompt=prompt, seed=seed))[0].image for seed, prompt in enumerate(PROMPTS)
    ]
    return [torch.from_numpy(numpy.asarray(image, dtype=numpy.float32)) for image in made]


def psnr(a: Tensor, b: Tensor) -> float:
    """In dB."""
    return 10 * math.log10(255**2 / max(float((a - b).square().mean()), 1e-9))


def times(ways: list[AttentionBackend], device: torch.device, *, tiles: bool) -> None:
    """Milliseconds of all ways in turns, beside the definition, and of the tiles of our kernel."""
    a = torch.randn(SIDE, SIDE, device=device, dtype=torch.bfloat16)
    ceiling = 2 * SIDE**3 / measure(partial(torch.mm, a, a)).median
    for shape, plain in SHAPES.items():
        case = replace(plain, by_name=True).on(device)
        generator = torch.Generator(device).manual_seed(0)
        size = (case.batch, case.queries, case.heads, case.width)
        q, k, v = (torch.randn(size, device=device, dtype=case.dtype, generator=generator) for _ in range(3))
        usable: dict[str, Run] = {}
        for way in ways:
            if way.name.startswith("plain"):
                continue
            try:
                seconds(way, case)
            except UnusableError as error:
                report("attention_unusable", "", 0.0, way=way.name, shape=shape, why=str(error))
            else:
                usable[way.name] = partial(way.run, q, k, v)
        with torch.inference_mode():
            taken = interleave(usable, warmup=3, repeats=20)
        flop = 4 * case.batch * case.heads * case.queries * case.keys * case.width
        for name, timing in taken.items():
            share = flop / timing.median / ceiling
            report(
                "attention_time", "s", timing, way=name, shape=shape, tflops=round(flop / timing.median / 1e12, 1),
                of_bf16_ceiling=round(share, 3), to_sdpa=round(ratio(timing, taken["sdpa"]).median, 3),
            )  # fmt: skip
        if tiles:
            _tiles(q, k, v, flop, shape)


def _tiles(q: Tensor, k: Tensor, v: Tensor, flop: int, shape: str) -> None:
    from octavo.fp8.attention import FP8, INT8, INT8_FP8
    from octavo.fp8.kernels.attention import Tile, attend
    from octavo.fp8.kernels.errors import TritonError

    for name, rounded in (("fp8", FP8), ("int8-fp8", INT8_FP8), ("int8", INT8)):
        for tile in (Tile(m, n, w, s) for m in (64, 128) for n in (64, 128) for w in (4, 8) for s in (2, 3, 4)):
            try:
                timing = measure(partial(attend, q, k, v, rounded=rounded, tile=tile), warmup=3, repeats=10)
            except (RuntimeError, TritonError) as error:  # too much shared memory
                report("attention_tile", "s", 0.0, way=name, tile=str(tile), shape=shape, why=str(error)[:80])
                continue
            rate = round(flop / timing.median / 1e12, 1)
            report("attention_tile", "s", timing, way=name, tile=str(tile), shape=shape, tflops=rate)


if __name__ == "__main__":
    main()
