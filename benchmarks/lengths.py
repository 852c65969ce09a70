"""A prompt and a negative of unlike lengths: one call of the model, its text packed, against a call for each.

Both ways in turns, on one thread's processor time: the embedded model at 128x128 pixels with a prompt of three chunks
against an empty negative, and a block as wide as SD3.5 Medium's with random weights, in float32 and in FP8, at 256x256
and 512x512 pixels. Each with the largest difference of the two velocities, relative to the largest velocity, and beside
the same ratio for texts of equal length, so that what packing costs is told from what a call of two rows costs.

    python -m benchmarks.lengths                 # minutes
    python -m benchmarks.lengths --repeats 3     # a quick look
"""

import argparse
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.common import interleave, ratio, report
from benchmarks.mmdit_step import fp8_mmdit, random_mmdit
from octavo import load
from octavo.devices import whole_processor
from octavo.models import MMDiT
from octavo.models.packed import pack
from octavo.pipeline.encode import encode

LONG = " ".join(["a large red star on a blue background, a small green circle, three yellow hearts in a row;"] * 4)
DEPTH = 1  # blocks of the wide model, of which Medium has 24


@torch.inference_mode()
@whole_processor()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    components = load(device="cpu", dtype="float32")
    sides = [encode(components.text, words, 2) for words in (LONG, "")]
    pooled = torch.cat([side.pooled for side in sides])
    texts = [side.context for side in sides]
    _compare("embedded model", components.mmdit(), texts, pooled, side=16, repeats=repeats)
    torch.manual_seed(0)
    # T5's and CLIP's tokens of a prompt of two chunks, and of an empty one.
    texts = [torch.randn(1, length, 4096) for length in (2 * 77 + 154, 77 + 77)]
    pooled = torch.randn(2, 2048)
    for name in ("float32", "FP8"):
        model = random_mmdit(DEPTH) if name == "float32" else fp8_mmdit(DEPTH, "exact")
        for side in (32, 64):
            _compare(f"a block of Medium's width, {name}", model, texts, pooled, side=side, repeats=repeats)


def _compare(name: str, model: MMDiT, texts: Sequence[Tensor], pooled: Tensor, *, side: int, repeats: int) -> None:
    table = model.modulation(torch.full((2,), 600.0), pooled)
    x = torch.randn(2, 16, side, side, generator=torch.Generator().manual_seed(1))
    texts = sorted(texts, key=lambda text: text.shape[1])  # as the pipeline does
    mean = sum(text.shape[1] for text in texts) // 2
    equal = [texts[1][:, :mean], texts[1][:, -mean:]]

    def together(texts: Sequence[Tensor]) -> Tensor:
        velocity: Tensor = model(x, pack(texts), table)
        return velocity

    def apart(texts: Sequence[Tensor]) -> Tensor:
        return torch.cat([model(*row) for row in zip(x.chunk(2), texts, table.each(), strict=True)])

    runs = {
        "one": lambda: together(texts),
        "two": lambda: apart(texts),
        "one equal": lambda: together(equal),
        "two equal": lambda: apart(equal),
    }
    seconds = interleave(runs, warmup=1, repeats=repeats, clock=time.thread_time)
    conditions = {"tokens": [text.shape[1] for text in texts], "pixels": f"{8 * side}x{8 * side}"}
    for lengths, suffix in (("unlike", ""), ("equal", " equal")):
        share = ratio(seconds["one" + suffix], seconds["two" + suffix])
        report(f"{lengths} lengths, {name}: one call over two", "ratio", share, **conditions)
    one, two = together(texts), apart(texts)
    error = float((one - two).abs().max() / two.abs().max())
    report(f"unlike lengths, {name}: largest difference", "relative", error, **conditions)


if __name__ == "__main__":
    main()
