"""How well the embedded model follows edges, with its ControlNet and without.

Pictures are drawn of things anywhere, letters among them; the model is told their colours alone and follows their
edges. What it drew goes through the same Canny as what it was to follow. The measure is the F1 of edge pixels within 2
pixels of each other (`octavo.evaluate.edges`). The net's training has seen none of these pictures.

    python -m benchmarks.control                            # 48 pictures with and without
    python -m benchmarks.control --force-fp8 --count 24     # the model in FP8, too; the net always is
    python -m benchmarks.control --strength 0.5
    python -m benchmarks.control --sheet sheet.png          # and what was drawn: asked, edges, with, without
"""

import argparse
import random
import tempfile
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.common import report
from octavo import GenerateRequest, generate, load
from octavo.evaluate.edges import WITHIN, edge_agreement
from octavo.pipeline.control_request import ControlImage
from octavo.pipeline.latents import pixels_of
from octavo.train.controlnet import edges_of, lesson_scene, unshaped
from octavo.train.drawing import draw, to_bytes
from octavo.train.pictures import contact_sheet


def main() -> None:
    arguments = _arguments()
    components = load(force_fp8=arguments.force_fp8, device="cpu")
    rng = random.Random("examination of controls")
    scenes = [lesson_scene(rng) for _ in range(arguments.count)]
    wanted = draw(scenes, 128)
    drawn: dict[str, list[Image.Image]] = {"with": [], "without": []}
    with tempfile.TemporaryDirectory() as folder:
        for i, scene in enumerate(scenes):
            path = Path(folder) / f"{i}.png"
            Image.fromarray(to_bytes(wanted[i : i + 1])[0]).save(path)
            control = ControlImage(
                image=str(path), type="canny", preprocess="canny", strength=arguments.strength, end=arguments.end
            )
            for name, controls in (("with", (control,)), ("without", ())):
                asked = GenerateRequest(prompt=unshaped(scene), seed=i, controls=controls, steps=arguments.steps)
                drawn[name].append(generate(components, asked)[0].image)
    conditions = {
        "pictures": arguments.count,
        "within_pixels": WITHIN,
        "strength": arguments.strength,
        "end": arguments.end,
        "steps": arguments.steps or components.preset.steps,
        "fp8_linears": components.mmdit.fp8_linears,
    }
    for name, images in drawn.items():
        scores = edge_agreement(_edges(images), edges_of(wanted)[:, :1]).tolist()
        report(
            "edge_agreement",
            "f1",
            mean(scores),
            control=name,
            lowest=min(scores),
            above_08=sum(s >= 0.8 for s in scores),
            **conditions,
        )
    if arguments.sheet is not None:
        columns = min(arguments.columns, arguments.count)
        rows = [to_bytes(wanted[:columns]), to_bytes(edges_of(wanted[:columns]) * 2 - 1)]
        rows += [np.stack([np.asarray(image) for image in drawn[name][:columns]]) for name in ("with", "without")]
        sheet = contact_sheet(np.concatenate(rows), columns)
        sheet.quantize(64).save(arguments.sheet, optimize=True)


def _edges(images: list[Image.Image]) -> Tensor:
    return edges_of(torch.cat([pixels_of(image) for image in images]))[:, :1]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="How well the embedded model follows edges.")
    parser.add_argument("--count", type=int, default=48, help="pictures")
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--strength", type=float, default=1.0)
    parser.add_argument("--end", type=float, default=1.0)
    parser.add_argument("--force-fp8", action="store_true")
    parser.add_argument("--sheet", type=Path, default=None, help="PNG to write")
    parser.add_argument("--columns", type=int, default=6, help="of the sheet")
    return parser.parse_args()


if __name__ == "__main__":
    main()
