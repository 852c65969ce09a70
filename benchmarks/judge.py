"""How well the embedded model's judge matches pictures and captions.

On drawings made apart from its training: the share of pictures whose own caption comes first among 100 of different
scenes, and of captions whose picture does; and the share of pictures that fit their own caption better than one with a
single attribute changed, by attribute. Then the same attributes on the embedded model's own pictures of its
examination's prompts, and the mean similarity of pictures to their own and to wrong captions. One line of JSON each.

    python -m benchmarks.judge                       # drawings alone: seconds
    python -m benchmarks.judge --pictures 200        # and 200 pictures by the embedded model
"""

import argparse
import random
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import report
from octavo import GenerateRequest, generate, load
from octavo.evaluate.checker import judge as check
from octavo.evaluate.checker import load_classifier, read
from octavo.evaluate.judge import Judge, load_judge
from octavo.evaluate.prompts import questions
from octavo.train.captions import caption
from octavo.train.drawing import draw
from octavo.train.judge import STAGE, to_uint8
from octavo.train.neighbours import changeable, changed, same_picture
from octavo.train.scenes import Scene, jittered, sample_scene

SIZE = 128  # pixels, as the embedded model draws
AMONG = 100  # captions, of which one is right


@torch.inference_mode()
def main() -> None:
    arguments = _arguments()
    judge = load_judge(arguments.judge)
    rng = random.Random(f"judge's examination {arguments.seed}")
    hundreds = [_different_scenes(rng, AMONG) for _ in range(arguments.hundreds)]
    found = [_retrieval(judge, scenes, rng) for scenes in hundreds]
    conditions = {"among": AMONG, "hundreds": arguments.hundreds}
    report("judge: caption found for a drawing", "share", _mean([f[0] for f in found]), **conditions)
    report("judge: drawing found for a caption", "share", _mean([f[1] for f in found]), **conditions)

    scenes = [scene for hundred in hundreds for scene in hundred]
    pictures = _drawn(scenes, rng)
    prompts = [caption(scene, rng) for scene in scenes]
    _report_choices(judge, "drawings", pictures, prompts, scenes, rng)
    if arguments.pictures:
        pictures, prompts, scenes = _painted(arguments.pictures)
        _report_choices(judge, "the embedded model's right pictures", pictures, prompts, scenes, rng)


def _different_scenes(rng: random.Random, count: int) -> list[Scene]:
    scenes: dict[object, Scene] = {}
    while len(scenes) < count:
        scene = sample_scene(rng, STAGE, held_out=rng.random() < 0.25)
        scenes.setdefault(same_picture(scene), scene)
    return list(scenes.values())


def _drawn(scenes: Sequence[Scene], rng: random.Random) -> Tensor:
    return to_uint8(torch.cat([draw([jittered(scene, rng)], SIZE) for scene in scenes]))


def _retrieval(judge: Judge, scenes: Sequence[Scene], rng: random.Random) -> tuple[float, float]:
    """Share of pictures whose caption comes first, and of captions whose picture does."""
    texts = judge.text_features([caption(scene, rng) for scene in scenes])
    cosines = judge.image_features(_drawn(scenes, rng)) @ texts.T
    right = torch.arange(len(scenes))
    return (
        float((cosines.argmax(dim=1) == right).float().mean()),
        float((cosines.argmax(dim=0) == right).float().mean()),
    )


def _report_choices(
    judge: Judge, of: str, pictures: Tensor, prompts: Sequence[str], scenes: Sequence[Scene], rng: random.Random
) -> None:
    """By attribute: share of pictures nearer to their own prompt than to one that is wrong in this attribute alone."""
    own = judge.similarity(pictures, prompts)
    wrong: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for i, scene in enumerate(scenes):
        for attribute in changeable(scene):
            wrong[attribute].append((i, caption(changed(scene, attribute, rng), rng)))
    report(f"judge on {of}: similarity to the own caption", "100 cos", float(own.mean()), pictures=len(scenes))
    for attribute, cases in wrong.items():
        rows = torch.tensor([i for i, _ in cases])
        other = judge.similarity(pictures[rows], [text for _, text in cases])
        share = float((own[rows] > other).float().mean())
        report(f"judge on {of}: right caption, not one of wrong {attribute}", "share", share, captions=len(cases))
        report(f"judge on {of}: similarity to a caption of wrong {attribute}", "100 cos", float(other.mean()))


def _painted(count: int) -> tuple[Tensor, list[str], list[Scene]]:
    """Pictures by the embedded model, in float16 with its own settings, that the checker found right."""
    components, classifier = load(), load_classifier()
    pictures, prompts, scenes = [], [], []
    for seed, question in enumerate(questions(STAGE, count)):
        request = GenerateRequest(prompt=question.prompt, seed=seed)
        picture = np.array(generate(components, request)[0].image)
        if not check(question.scene, read(picture, classifier))["all"]:
            continue
        pictures.append(torch.from_numpy(picture).permute(2, 0, 1))
        prompts.append(question.prompt)
        scenes.append(question.scene)
    return torch.stack(pictures), prompts, scenes


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--judge", type=Path, help="another judge's file, e.g. of a run of `octavo train judge`")
    parser.add_argument("--hundreds", type=int, default=10, help="of drawings")
    parser.add_argument("--pictures", type=int, default=0, help="by the embedded model, a second or so each")
    parser.add_argument("--seed", type=int, default=0, help="of the drawings")
    return parser.parse_args()


if __name__ == "__main__":
    main()
