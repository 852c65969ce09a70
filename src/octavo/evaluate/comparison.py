"""Columns side by side: the same prompts and seeds by each, and every number that tells them apart.

    columns = [ModelColumn.of("16-bit", original), ModelColumn.of("FP8", quantized)]
    comparison = compare(columns, builtin_prompts(200, embedded=True), out=Path("out"))
    comparison.to_json()["columns"][1]["scores"]["psnr"]

The first column is the reference. `drawn` makes the pictures, `scores` counts, `report` shows.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from octavo.errors import RequestError
from octavo.evaluate.columns import Column
from octavo.evaluate.drawn import SAME_MODEL, Drawn, Studio, Watch
from octavo.evaluate.features import FeatureNetwork, JudgeNetwork, PerceptualDistance
from octavo.evaluate.gallery import Gallery, Record, slug, write_text
from octavo.evaluate.machine import describe_machine
from octavo.evaluate.metrics import require_torchmetrics
from octavo.evaluate.prompt_set import Prompt
from octavo.evaluate.scores import ReferenceSet, Scorer, Scores, performance
from octavo.evaluate.typography import TextReader
from octavo.evaluate.velocity import VelocityErrors
from octavo.pipeline.image import open_image
from octavo.train.scenes import Scene, Thing
from octavo.train.spelling import Word

DRAWINGS = 2048  # of the embedded model's reference set
FORMAT = 1  # of report.json


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How to compare; everything has a default."""

    settings: Mapping[str, Any] = field(default_factory=dict)  # of GenerateRequest; else as suits the reference
    seed: int = 0  # of the first picture, the next ones count up
    network: FeatureNetwork | None = None  # for scores, FID and CMMD; None: the embedded model's judge
    distance: PerceptualDistance | None = None  # None: the judge's
    reader: TextReader | None = None  # of words in pictures; None: only the checker reads, in the embedded model's
    reference_folder: Path | None = None  # pictures for FID and CMMD
    drawings: int = DRAWINGS  # in place of such a folder, for the embedded model; 0 for none
    velocity_prompts: int = 4  # asked with teacher forcing; 0 leaves it out
    other_seeds: bool = False  # let the reference draw twice, to show how far pictures of other seeds are apart
    restart: bool = False  # throw away what an earlier run left in the folder


@dataclass(frozen=True, slots=True)
class ColumnResult:
    """One column with its numbers."""

    drawn: Drawn
    scores: Scores
    performance: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        """Plain data; pictures and their single scores are left to results.json."""
        velocity = self.drawn.velocity
        return {
            "name": self.drawn.name,
            "same_seed": self.drawn.same_seed,
            "facts": dict(self.drawn.facts),
            "scores": dict(self.scores.overall),
            "performance": dict(self.performance),
            "velocity": velocity.to_json() if velocity else None,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Everything that a report shows."""

    columns: Sequence[ColumnResult]  # the first is the reference
    prompts: Sequence[Prompt]
    settings: Mapping[str, Any]  # that all models were asked with
    seed: int
    network: str
    distance: str
    reader: str | None
    reference_set: str | None
    features: int  # D, of the network
    machine: Mapping[str, Any]
    embedded: bool
    command: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain data: what report.json holds."""
        return {
            "format": FORMAT,
            "command": self.command,
            "machine": dict(self.machine),
            "settings": dict(self.settings),
            "seed": self.seed,
            "prompts": len(self.prompts),
            "embedded": self.embedded,
            "network": {"name": self.network, "features": self.features},
            "distance": self.distance,
            "reader": self.reader,
            "reference_set": self.reference_set,
            "columns": [column.to_json() for column in self.columns],
        }

    def results(self) -> dict[str, Any]:
        """Every picture's scores: what results.json holds. Nothing in it depends on the clock."""
        return {
            "prompts": [prompt.text for prompt in self.prompts],
            "columns": {
                column.drawn.name: {str(number): values for number, values in column.scores.by_picture.items()}
                for column in self.columns
            },
        }


def compare(
    columns: Sequence[Column | Drawn],
    prompts: Sequence[Prompt],
    *,
    out: Path | None = None,
    options: Options | None = None,
    command: str = "",
    watch: Watch = lambda _column, _stage, _done, _total: None,
) -> Comparison:
    """Draw the prompts by every column, and score the pictures.

    Args:
        columns: the first one is the reference; a `Drawn` is taken as it is.
        prompts: picture n is that of prompt n, drawn with seed + n - 1.
        out: folder that keeps pictures and whatever else a stopped run goes on from; None keeps nothing.
        options: how to compare.
        command: for the report.
        watch: called with the progress.

    Raises:
        MissingExtraError: torchmetrics is not installed.
        RequestError: no columns or no prompts, two columns of one name, or a folder that was drawn otherwise.
        OctavoError: whatever loading a model or drawing with it raises.
    """
    options = options or Options()
    require_torchmetrics()
    _check(columns, prompts)
    place: AbstractContextManager[Any] = (
        nullcontext(out) if out is not None else tempfile.TemporaryDirectory(prefix="octavo-")
    )
    with place as folder:
        studio = Studio(
            gallery=Gallery(Path(folder), [prompt.text for prompt in prompts], restart=options.restart),
            prompts=[prompt.text for prompt in prompts],
            settings=options.settings,
            seed=options.seed,
            velocity_prompts=options.velocity_prompts,
            other_seeds=options.other_seeds,
            watch=watch,
        )
        _keep_prompts(Path(folder), prompts)
        drawn: list[Drawn] = []
        for column in columns:
            drawn += [column] if isinstance(column, Drawn) else studio.draw(column)
        drawn.sort(key=lambda each: each.name.endswith(SAME_MODEL))  # behind those that are to be judged
        return _scored(drawn, prompts, studio, options, command, watch)


def _scored(
    drawn: Sequence[Drawn], prompts: Sequence[Prompt], studio: Studio, options: Options, command: str, watch: Watch
) -> Comparison:
    judge = JudgeNetwork()
    network, distance = options.network or judge, options.distance or judge.distance()
    scenes = any(prompt.scene is not None for prompt in prompts)
    reference_set = None
    if options.reference_folder is not None:
        reference_set = ReferenceSet.folder(network, options.reference_folder)
    elif scenes and options.drawings:
        side = open_image(next(iter(drawn[0].paths.values()))).width
        reference_set = ReferenceSet.drawings(network, options.drawings, side)
    scorer = Scorer(
        prompts=prompts,
        reference=drawn[0],
        network=network,
        distance=distance,
        reader=options.reader,
        reference_set=reference_set,
        watch=watch,
    )
    template = studio.template
    settings = {} if template is None else dict(template.settings)
    for name in ("prompt", "seed", "model", "version"):
        settings.pop(name, None)
    return Comparison(
        columns=[ColumnResult(each, scorer.score(each), performance(each)) for each in drawn],
        prompts=prompts,
        settings=settings or dict(options.settings),
        seed=options.seed,
        network=network.name,
        distance=distance.name,
        reader=None if options.reader is None else options.reader.name,
        reference_set=None if reference_set is None else reference_set.name,
        features=network.text_features(["a"]).shape[1],
        machine=describe_machine(studio.device),
        embedded=scenes,
        command=command,
    )


def _check(columns: Sequence[Column | Drawn], prompts: Sequence[Prompt]) -> None:
    if not columns or not prompts:
        raise RequestError("A comparison needs at least one column and one prompt.")
    names = [slug(column.name) for column in columns]
    if twice := [name for name in names if names.count(name) > 1]:
        raise RequestError(f"Two columns are called '{twice[0]}'; write NAME=MODEL to tell them apart.")


# ── from one report to the next ───────────────────────────────────────────────────────────────────────────────────
def _keep_prompts(folder: Path, prompts: Sequence[Prompt]) -> None:
    data = [{"text": p.text, "scene": asdict(p.scene) if p.scene else None} for p in prompts]
    write_text(folder / "prompts.json", json.dumps(data, indent=1))


def open_report(folder: Path) -> tuple[list[Prompt], list[Drawn], dict[str, Any]]:
    """The prompts and columns of a report made before, and what its report.json says.

    Raises:
        RequestError: the folder is no report, or of a newer version.
    """
    try:
        report = json.loads((folder / "report.json").read_text("utf-8"))
        if report["format"] != FORMAT:
            raise RequestError(f"{folder} is a report of another version of Octavo (format {report['format']}).")
        prompts = [
            Prompt(entry["text"], _scene(entry["scene"]))
            for entry in json.loads((folder / "prompts.json").read_text("utf-8"))
        ]
        columns = [_drawn(folder, entry, len(prompts)) for entry in report["columns"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RequestError(
            f"{folder} cannot be read as a report ({error}); give a folder that 'octavo evaluate --report' wrote."
        ) from error
    return prompts, columns, report


def _drawn(folder: Path, entry: Mapping[str, Any], count: int) -> Drawn:
    place = folder / "pictures" / slug(entry["name"])
    paths = {number: place / f"{number:05}.png" for number in range(1, count + 1)}
    records = {}
    if (place / "drawn.jsonl").exists():
        for line in (place / "drawn.jsonl").read_text("utf-8").splitlines():
            record = Record(**json.loads(line))
            records[record.number] = record
    there = {number: path for number, path in paths.items() if path.exists()}
    if not there:
        raise RequestError(f"The pictures of '{entry['name']}' are no longer in {place}.")
    return Drawn(
        name=entry["name"],
        paths=there,
        same_seed=entry["same_seed"],
        records={number: record for number, record in records.items() if number in there},
        facts=entry["facts"],
        velocity=VelocityErrors.from_json(entry["velocity"]) if entry["velocity"] else None,
    )


def _scene(data: Mapping[str, Any] | None) -> Scene | None:
    if data is None:
        return None
    word = data["word"]
    things = tuple(Thing(**thing) for thing in data["things"])
    return replace(Scene(**{**data, "things": things}), word=Word(**word) if word else None)
