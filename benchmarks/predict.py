"""What simulated cards take for a picture: every card, SD3.5 Large and Medium, FP8 and 16 bits, roomy and small.

python -m benchmarks.predict --out docs/benchmarks/predicted.json
python -m benchmarks.predict --against measured.json --card h200 --model large --format fp8 --memory all

Nothing is measured here. The second command holds figures of a real device, as `placement.predictions.compare` takes
them, against the stored ones, and prints what kept to them.
"""

import argparse
import datetime
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from octavo._version import __version__
from octavo.checkpoint.skeletons import Format, skeletons
from octavo.errors import PlacementError
from octavo.placement.cards import CARDS
from octavo.placement.plan import make_plan
from octavo.placement.predictions import compare, prediction
from octavo.placement.shapes import Shapes
from octavo.placement.sizes import human
from octavo.placement.work import Work

STORED = Path("docs/benchmarks/predicted.json")
MODELS = ("large", "medium")
Memory = Literal["all", "small"]
SMALL: Mapping[Format, int] = {"fp8": 3 * 10**9, "bf16": 4 * 10**9}  # bytes
WORK = Work(width=1024, height=1024, steps=20, rows=2, tokens=333, prompts=2)


def predict(card: str, shapes: Shapes, fmt: Format, memory: Memory) -> dict[str, Any]:
    """One entry: a plan's figures, shortened, or the least that would do where it does not fit.

    Args:
        card: of the table.
        memory: "all" that the card has, or a "small" part of it.
    """
    known = CARDS[card]
    try:
        whole = prediction(make_plan(shapes, known.usable if memory == "all" else SMALL[fmt], known, work=WORK))
    except PlacementError as error:
        return {"least": error.least}
    stages = {name: {key: each[key] for key in ("peak", "seconds")} for name, each in whole["stages"].items()}
    parts = {kind: f"{each['resident']}/{each['layers']}" for kind, each in whole["parts"].items() if each["layers"]}
    return {**{key: whole[key] for key in ("peak", "seconds", "tile")}, "resident": parts, "stages": stages}


def everything() -> dict[str, Any]:
    """All entries, by model, format, memory and card."""
    found: dict[str, Any] = {}
    for model in MODELS:
        for fmt in get_args(Format):
            shapes = Shapes.of(skeletons(model, fmt))
            for memory in get_args(Memory):
                for card in CARDS:
                    found[key(model, fmt, memory, card)] = predict(card, shapes, fmt, memory)
    return found


def key(model: str, fmt: Format, memory: Memory, card: str) -> str:
    """What an entry is found by."""
    return f"{model} {fmt} {memory} {card}"


def write(path: Path) -> None:
    """Put everything into a file, one entry a line."""
    small = ", ".join(f"{human(n)} in {fmt}" for fmt, n in SMALL.items())
    about = {
        "predicted": True,
        "about": "By simulated cards; nothing here was measured. Bytes are bounds, seconds estimates.",
        "command": "python -m benchmarks.predict",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "version": __version__,
        "work": f"{WORK.width}x{WORK.height}, {WORK.steps} steps, {WORK.rows} rows, {WORK.tokens} text tokens",
        "memory": f"all: what the card has; small: {small}",
        "rates": {name: card.source for name, card in CARDS.items()},
    }
    entries = ",\n".join(f"  {json.dumps(name)}: {json.dumps(each)}" for name, each in everything().items())
    head = json.dumps(about, indent=1, ensure_ascii=False).removesuffix("\n}")
    path.write_text(f'{head},\n "predictions": {{\n{entries}\n }}\n}}\n', "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=STORED, help="file of the predictions")
    parser.add_argument("--against", type=Path, help="file of measured figures, to be held against the stored ones")
    parser.add_argument("--card", choices=CARDS, default="h200")
    parser.add_argument("--model", choices=MODELS, default="large")
    parser.add_argument("--format", choices=get_args(Format), default="fp8")
    parser.add_argument("--memory", choices=get_args(Memory), default="all")
    arguments = parser.parse_args()
    if arguments.against is None:
        write(arguments.out)
        print(json.dumps({"name": "predict", "written": str(arguments.out)}))
        return
    stored = json.loads(arguments.out.read_text("utf-8"))["predictions"]
    entry = stored[key(arguments.model, arguments.format, arguments.memory, arguments.card)]
    for each in compare(entry, json.loads(arguments.against.read_text("utf-8"))):
        print(each)


if __name__ == "__main__":
    main()
