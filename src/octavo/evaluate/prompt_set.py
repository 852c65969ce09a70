"""What models are asked when they are compared: prompts, and what a right picture of each is known to show.

A prompt file has one prompt a line. Words in double quotes are words that the picture is to show; the typography score
asks for them. The built-in prompts open with three standing ones, which every report shows; the embedded model, which
knows only shapes and colours, has equivalents of them and is then asked the examination's questions.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from octavo.errors import RequestError
from octavo.evaluate.prompts import questions
from octavo.train.scenes import (
    PAIR_RADIUS,
    PAIR_SPOT,
    PLACES,
    RADIUS_AT_PLACE,
    SPOT,
    Scene,
    Thing,
    jittered,
    sample_scene,
)

STANDING = 3  # the first prompts of either built-in set
EMBEDDED_STAGE = 3  # what the package's model was trained up to, see `train.scenes.MIXES`


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt, and what is known of a right picture."""

    text: str
    scene: Scene | None = None  # for the embedded model: all that the picture shows

    @property
    def words(self) -> tuple[str, ...]:
        """Words that the picture is to show, in capitals: those in quotes, or the scene's."""
        if self.scene is not None:
            return (self.scene.word.text,) if self.scene.word else ()
        quoted = " ".join(re.findall(r'["“]([^"”]+)["”]', self.text))
        return tuple(re.findall(r"[^\W_]+", quoted.upper()))


def builtin_prompts(count: int | None = None, *, embedded: bool) -> list[Prompt]:
    """The built-in prompts, standing ones first.

    Args:
        count: how many; beyond the 128 for real models they come again, which other seeds make other pictures of. None
            for all 128, or for 200 of the embedded model's.
        embedded: those of the embedded model's world.
    """
    if embedded:
        asked = questions(EMBEDDED_STAGE, max(0, (count or 200) - STANDING))
        return [*_embedded_standing(), *(Prompt(question.prompt, question.scene) for question in asked)][:count]
    lines = files("octavo.evaluate").joinpath("builtin_prompts.txt").read_text("utf-8").splitlines()
    return repeated([Prompt(line) for line in lines], count)


def read_prompts(path: Path, count: int | None = None) -> list[Prompt]:
    """The prompts of a text file, one a line; empty lines are skipped.

    Args:
        path: of the file, UTF-8.
        count: how many; where there are fewer they come again from the first one on. None for as many as there are.

    Raises:
        RequestError: it cannot be read, or is empty.
    """
    try:
        lines = [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeError) as error:
        raise RequestError(f"Cannot read the prompts of {path}: {error}.") from error
    if not lines:
        raise RequestError(f"There is no prompt in {path}; write one a line.")
    return repeated([Prompt(line) for line in lines], count)


def repeated(prompts: list[Prompt], count: int | None) -> list[Prompt]:
    """`count` prompts, from the first one on and again from the first."""
    return prompts if count is None else [prompts[i % len(prompts)] for i in range(count)]


def reference_scenes(count: int, seed: int = 0) -> list[Scene]:
    """Scenes as the examination's, by other draws: whose drawings are the reference set of FID and CMMD."""
    rng = random.Random(f"reference set {seed} {EMBEDDED_STAGE}")
    return [jittered(sample_scene(rng, EMBEDDED_STAGE, held_out=True), rng) for _ in range(count)]


def _embedded_standing() -> list[Prompt]:
    """Neon above its reflection in a black street; a rune in a dim library; a white key beside a black one."""
    below, above = 0.5 + PAIR_SPOT, 0.5 - PAIR_SPOT
    dx, dy = PLACES["top left"]
    return [
        Prompt(
            "a pink heart above a purple heart on a black background",
            Scene(
                "pair",
                (Thing("heart", "pink", 0.5, above, PAIR_RADIUS), Thing("heart", "purple", 0.5, below, PAIR_RADIUS)),
                "black",
                relation="above",
            ),
        ),
        Prompt(
            "a small yellow cross at the top left on a purple background",
            Scene(
                "single",
                (
                    Thing(
                        "cross", "yellow", 0.5 + dx * SPOT["small"], 0.5 + dy * SPOT["small"], RADIUS_AT_PLACE["small"]
                    ),
                ),
                "purple",
                place="top left",
                size="small",
            ),
        ),
        Prompt(
            "a white square left of a black square on a gray background",
            Scene(
                "pair",
                (Thing("square", "white", above, 0.5, PAIR_RADIUS), Thing("square", "black", below, 0.5, PAIR_RADIUS)),
                "gray",
                relation="left of",
            ),
        ),
    ]
