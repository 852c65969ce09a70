"""How often the embedded model's pictures are right, over prompts that its training never showed.

Every prompt has a pair of shape and colour kept out of training, every other one a wording kept out as well; the
pictures come from `octavo.generate` with the model's own settings and are read by the checker. One line of JSON for
each attribute, each kind of scene and each kind of wording, and one for the checker itself on drawings of the truth.

    python -m benchmarks.embedded                                 # 200 prompts over the mix of stages 1 to 3
    python -m benchmarks.embedded --stage 2 --count 50            # a quick look
    python -m benchmarks.embedded --fp8 --sheet sheet.png         # the FP8 file, and a contact sheet of what it drew
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import report
from octavo import GenerateRequest, generate, load
from octavo.checkpoint.folders import EMBEDDED
from octavo.evaluate.checker import Picture, load_classifier
from octavo.evaluate.examine import examine
from octavo.evaluate.prompts import questions
from octavo.models import VAE
from octavo.pipeline.decode import decode, encode_image
from octavo.train.drawing import draw, to_bytes
from octavo.train.pictures import contact_sheet
from octavo.train.scenes import Scene

FP8 = EMBEDDED / "diffusion_models" / "octavo-demo-fp8.safetensors"


def main() -> None:
    arguments = _arguments()
    components = load(FP8 if arguments.fp8 else arguments.model)
    asked = questions(arguments.stage, arguments.count)
    classifier = load_classifier()
    seeds = {question.prompt: seed for seed, question in enumerate(asked)}

    def paint(prompts: list[str]) -> list[Picture]:
        requests = [
            GenerateRequest(
                prompt=prompt,
                seed=seeds[prompt],
                steps=arguments.steps,
                guidance_scale=arguments.guidance,
                sampler=arguments.sampler,
                shift=arguments.shift,
            )
            for prompt in prompts
        ]
        return [np.asarray(generate(components, request)[0].image) for request in requests]

    outcome = examine(paint, asked, classifier)
    conditions = {
        "model": components.mmdit.path.name,
        "prompts": arguments.count,
        "stage": arguments.stage,
        "steps": arguments.steps or components.preset.steps,
        "guidance_scale": arguments.guidance or components.preset.guidance_scale,
        "sampler": arguments.sampler or components.preset.sampler,
        "shift": arguments.shift or components.preset.shift,
    }
    for name, rate in outcome.rates().items():
        report(f"embedded right: {name}", "share", rate, **conditions)
    size = outcome.pictures[0].shape[0]
    scenes = {question.prompt: question.scene for question in asked}
    truth = examine(lambda prompts: list(to_bytes(draw([scenes[p] for p in prompts], size))), asked, classifier)
    report("checker right on the truth: all", "share", truth.rates()["all"], prompts=arguments.count, pixels=size)
    _report_vae(components.vae(), [question.scene for question in asked], size, arguments.stage)
    if arguments.sheet:
        marks = ["" if verdict["all"] else "WRONG: " for verdict in outcome.verdicts]
        captions = [mark + question.prompt for mark, question in zip(marks, asked, strict=True)]
        shown = slice(0, arguments.shown)
        contact_sheet(np.stack(outcome.pictures[shown]), 8, captions[shown]).save(arguments.sheet)


@torch.inference_mode()
def _report_vae(vae: VAE, scenes: Sequence[Scene], size: int, stage: int) -> None:
    """Peak signal-to-noise ratio of the VAE's reconstructions of the drawings themselves, mean over scenes."""
    ratios = []
    for start in range(0, len(scenes), 20):
        pixels = draw(scenes[start : start + 20], size)
        again = decode(vae, encode_image(vae, pixels))
        error = ((again - pixels) / 2).square().mean(dim=(1, 2, 3))
        ratios += (-10 * error.log10()).tolist()
    report("embedded VAE: PSNR of reconstructions", "dB", sum(ratios) / len(ratios), scenes=len(scenes), stage=stage)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="another model file, e.g. of a run of `octavo train demo`")
    parser.add_argument("--fp8", action="store_true", help="the embedded model's FP8 file")
    parser.add_argument("--stage", type=int, default=3, help="whose mix of scenes is asked")
    parser.add_argument("--count", type=int, default=200, help="prompts")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--sampler")
    parser.add_argument("--shift", type=float)
    parser.add_argument("--sheet", type=Path, help="write a contact sheet to this PNG")
    parser.add_argument("--shown", type=int, default=40, help="pictures on the sheet")
    return parser.parse_args()


if __name__ == "__main__":
    main()
