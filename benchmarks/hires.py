"""What a second, larger pass does for a picture, on the embedded model, by the checker.

The model knows pictures of 128x128. Up to that size: things are drawn at 64x64, where they come out ragged, and made
larger; how many show what was asked after the second pass, by each way to enlarge and each denoise. Denoise 0 only
enlarges. Beyond it (`--beyond`): prompts that training never showed, drawn at 128x128 and made larger, and drawn at the
larger size at once. One line of JSON each.

    python -m benchmarks.hires                                                  # 100 prompts
    python -m benchmarks.hires --beyond --denoise 0 0.05 0.2 0.5 --count 50
    python -m benchmarks.hires --count 6 --method lanczos --denoise 0 0.5 --sheet docs/hires/pair.webp
"""

import argparse
import random
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from benchmarks.common import report
from octavo import GenerateRequest, generate, load
from octavo.evaluate.checker import judge, load_classifier, read
from octavo.evaluate.prompts import questions
from octavo.pipeline.hires import METHODS, Hires
from octavo.train.scenes import COLOURS, SHAPES, Scene, is_held_out, single_thing

STAGE = 3


class Asked(NamedTuple):
    """What is drawn, and what a right picture of it shows."""

    prompt: str
    again: str | None  # prompt of the second pass
    scene: Scene


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    components = load(device="cpu", dtype="float32")
    known = components.preset.width
    first, last = (known, 2 * known) if arguments.beyond else (known // 2, known)
    asked = list(_beyond(arguments.count) if arguments.beyond else _towards(arguments.count))
    ways = {"at once": GenerateRequest(prompt="-", width=last, height=last)}
    for method in arguments.method:
        for denoise in arguments.denoise:
            hires = Hires(scale=2, method=method, denoise=denoise, steps=arguments.steps)
            ways[f"{method}, denoise {denoise:g}"] = GenerateRequest(prompt="-", width=first, height=first, hires=hires)
    classifier = load_classifier()
    pictures: dict[str, list[Image.Image]] = {}
    for way, request in ways.items():
        pictures[way], right = [], 0
        for seed, each in enumerate(asked):
            again = request.hires and replace(request.hires, prompt=each.again)
            prompt = each.prompt if again else each.again or each.prompt
            (picture,) = generate(components, replace(request, prompt=prompt, hires=again, seed=seed))
            pictures[way].append(picture.image)
            right += judge(each.scene, read(np.asarray(picture.image), classifier))["all"]
        report(f"hires right: {way}", "share", right / len(asked), prompts=len(asked), first=first, last=last)
    if arguments.sheet:
        _sheet(pictures).save(arguments.sheet, quality=75)


def _towards(count: int) -> Iterator[Asked]:
    """One small thing in the middle: the 64 pixels there are all that the first pass draws, so it ends up large."""
    rng = random.Random("hires")
    for i in range(count):
        shape = SHAPES[i % len(SHAPES)]
        colour, background = rng.sample(COLOURS, 2)
        while is_held_out(shape, colour):
            colour, background = rng.sample(COLOURS, 2)
        article = "an" if background == "orange" else "a"
        words = f"{colour} {shape} on {article} {background} background"
        scene = Scene("single", (single_thing(shape, colour, "center", "large"),), background)
        yield Asked(f"a small {words}", f"a large {words}", scene)


def _beyond(count: int) -> Iterator[Asked]:
    for question in questions(STAGE, count):
        yield Asked(question.prompt, None, question.scene)


def _sheet(pictures: Mapping[str, list[Image.Image]]) -> Image.Image:
    """A row for each way by `hires`, a column for each prompt."""
    rows = [row for way, row in pictures.items() if way != "at once"]
    side = rows[0][0].width
    sheet = Image.new("RGB", (side * len(rows[0]), side * len(rows)))
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            sheet.paste(image, (x * side, y * side))
    return sheet


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100, help="prompts")
    parser.add_argument("--beyond", action="store_true", help="to twice the size that the model knows, not up to it")
    parser.add_argument("--method", nargs="+", choices=METHODS, default=["lanczos", "latent-bislerp"])
    parser.add_argument("--denoise", nargs="+", type=float, default=[0, 0.2, 0.3, 0.5])
    parser.add_argument("--steps", type=int, help="of the second pass; as many as of the first if unsaid")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sheet", type=Path, help="write the pictures of the second passes to this file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
