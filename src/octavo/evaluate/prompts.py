"""What the embedded model is asked in an examination: prompts that its training never showed.

Every prompt has a pair of shape and colour, or a word to show, that training keeps out; every other one is also worded
in an order that training never uses.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from octavo.train.captions import caption
from octavo.train.scenes import Scene, sample_scene


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt and the scene that a right picture of it shows."""

    prompt: str
    scene: Scene
    unseen_wording: bool


def questions(stage: int, count: int, seed: int = 0) -> list[Question]:
    """`count` different prompts over the mix of `stage`; the same for the same arguments."""
    rng = random.Random(f"examination {seed} {stage}")
    asked: dict[str, Question] = {}
    while len(asked) < count:
        unseen = len(asked) % 2 == 1
        scene = sample_scene(rng, stage, held_out=True)
        if unseen and not scene.says_background:  # too short to be worded in unheard-of ways
            continue
        prompt = caption(scene, rng, unseen=unseen)
        asked.setdefault(prompt, Question(prompt, scene, unseen))
    return list(asked.values())
