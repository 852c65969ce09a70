"""How well the embedded model learns a word from 30 pictures: its pictures, and accuracy before and after.

The model was trained on ten shapes. `flower` is in its vocabulary, but no picture of one ever came with the word, so
that it draws something else. The pictures here show flowers in known colours on known backgrounds; asked for are
others: no pair of colour and background of the lesson comes again. Everything is read by `octavo.evaluate.checker`,
which knows flowers. How much the model forgets is told by scenes that it knew before.

    python -m benchmarks.teach_lora pictures flowers/
    octavo train lora --data flowers/ --out flower.safetensors --steps 600 --batch 8 \\
        --learning-rate 0.001
    python -m benchmarks.teach_lora measure                          # before
    python -m benchmarks.teach_lora measure flower.safetensors       # after
"""

import argparse
import json
import random
from pathlib import Path

import numpy as np
from PIL import Image

from octavo.train.scenes import COLOURS, PLACES, Scene, jittered, sample_scene, single_thing

WORD = "flower"
LESSON, EXAM = 30, 60  # pictures
KNOWN = 60  # scenes of the model's own domain
STAGE = 3  # of that domain


def scenes(kind: str, count: int) -> list[Scene]:
    """Scenes with a flower, by lot: for the "lesson", or for the "exam" with other pairs of colours."""
    rng = random.Random(f"{WORD} {kind}")
    found: list[Scene] = []
    while len(found) < count:
        colour, background = rng.sample(COLOURS, 2)
        # A third of the pairs is kept for the exam.
        if ((COLOURS.index(colour) + 2 * COLOURS.index(background)) % 3 == 0) != (kind == "exam"):
            continue
        place = rng.choice([None, None, None, *PLACES])
        size = rng.choice([None, "small", "large"]) if place else None
        thing = single_thing(WORD, colour, place or "center", size or "large")
        found.append(Scene("single", (thing,), background, place=place, size=size))
    return found


def pictures(folder: Path) -> None:
    """Draw the lesson: 00.png with its caption in 00.txt, and so on."""
    from octavo.train.captions import caption
    from octavo.train.drawing import draw, to_bytes

    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(f"{WORD} captions")
    drawn = [jittered(scene, rng) for scene in scenes("lesson", LESSON)]
    for i, (scene, pixels) in enumerate(zip(drawn, to_bytes(draw(drawn, 128)), strict=True)):
        Image.fromarray(pixels).save(folder / f"{i:02}.png")
        (folder / f"{i:02}.txt").write_text(caption(scene, rng) + "\n")
    print(folder)


def measure(lora: Path | None, strength: float, model: str | None, sheet: Path | None) -> None:
    """One line of JSON: shares of the exam's flowers, and of known scenes, that are as asked."""
    from octavo import GenerateRequest, generate, load
    from octavo.evaluate.checker import judge, load_classifier, read
    from octavo.pipeline.request import Lora
    from octavo.train.captions import caption
    from octavo.train.pictures import contact_sheet

    components, classifier = load(model), load_classifier()
    loras = () if lora is None else (Lora(str(lora), strength),)
    rng = random.Random("known")
    exams = {"new": scenes("exam", EXAM), "known": [sample_scene(rng, STAGE) for _ in range(KNOWN)]}
    shares: dict[str, float] = {}
    shown: list[np.ndarray] = []
    words: list[str] = []
    for name, asked in exams.items():
        verdicts = []
        words_rng = random.Random(f"{name} words")
        for seed, scene in enumerate(asked):
            prompt = caption(scene, words_rng)
            (picture,) = generate(components, GenerateRequest(prompt=prompt, seed=seed, loras=loras))
            pixels = np.asarray(picture.image)
            verdicts.append(judge(scene, read(pixels, classifier)))
            if name == "new" and len(shown) < 12:
                shown.append(pixels)
                words.append(prompt)
        for attribute in ("shape", "all"):
            shares[f"{name} {attribute}"] = float(np.mean([verdict[attribute] for verdict in verdicts]))
    if sheet is not None:
        contact_sheet(np.stack(shown), 6, words).save(sheet, quality=70)
    told = {"lora": None if lora is None else lora.name, "strength": strength, "model": components.name}
    print(json.dumps({"name": "teach_lora", "unit": "share", **shares, "new": EXAM, "known": KNOWN, **told}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    drawing = commands.add_parser("pictures")
    drawing.add_argument("folder", type=Path)
    measuring = commands.add_parser("measure")
    measuring.add_argument("lora", type=Path, nargs="?")
    measuring.add_argument("--strength", type=float, default=1.0)
    measuring.add_argument("--model")
    measuring.add_argument("--sheet", type=Path, help="Write twelve of the pictures to this file.")
    arguments = parser.parse_args()
    if arguments.command == "pictures":
        pictures(arguments.folder)
    else:
        measure(arguments.lora, arguments.strength, arguments.model, arguments.sheet)


if __name__ == "__main__":
    main()
