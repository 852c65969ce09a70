"""Plans as plain data that outlive the program, and how a real device's figures are held against them.

A prediction says what a simulated card would take; `compare` says of each figure that was measured whether it kept to
it. Bytes are bounds: more than predicted is a fault. Seconds are estimates, made of rates that few products reach:
within `NEAR` they are as good as they can be.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from octavo.errors import RequestError
from octavo.placement.plan import STAGES, Plan

NEAR = 1.25  # times slower or faster


def prediction(plan: Plan) -> dict[str, Any]:
    """A plan as JSON has it: where each part lives, bytes and seconds of each stage."""
    card = plan.card
    return {
        "predicted": True,
        "card": None if card is None else card.name,
        "rates": None if card is None else card.source,
        "work": asdict(plan.work),
        "budget": plan.budget,
        "peak": plan.peak,
        "seconds": None if plan.seconds is None else _short(plan.seconds),
        "tile": plan.tile,
        "modulation_streamed": plan.modulation_streamed,
        "parts": {
            kind: {"resident": stay.resident, "layers": stay.layers, "slots": stay.slots, "leaves": stay.leaves}
            for kind, stay in plan.parts.items()
        },
        "stages": {
            name: {
                "peak": stage.peak,
                "weights": stage.weights,
                "buffers": stage.buffers,
                "work": stage.work,
                "seconds": None if stage.seconds is None else _short(stage.seconds),
            }
            for name, stage in plan.stages.items()
        },
    }


@dataclass(frozen=True, slots=True)
class Comparison:
    """One figure, predicted and measured."""

    what: str  # "denoise seconds", "peak bytes"
    unit: Literal["s", "bytes"]
    predicted: float
    measured: float

    @property
    def ratio(self) -> float:
        """Measured over predicted; below 1 the device did better."""
        return self.measured / self.predicted if self.predicted else float("inf") if self.measured else 1.0

    @property
    def kept(self) -> bool:
        """Whether the prediction was right: bytes at most as many, seconds near."""
        if self.unit == "bytes":
            return self.measured <= self.predicted
        return 1 / NEAR <= self.ratio <= NEAR

    def __str__(self) -> str:
        verdict = "as predicted" if self.kept else "MORE than predicted" if self.ratio > 1 else "less than predicted"
        scale, unit = (1e9, "GB") if self.unit == "bytes" else (1.0, "s")
        predicted, measured = self.predicted / scale, self.measured / scale
        return f"{self.what}: predicted {predicted:.3g} {unit}, measured {measured:.3g} ({self.ratio:.2f}): {verdict}"


def compare(predicted: Mapping[str, Any], measured: Mapping[str, Any]) -> list[Comparison]:
    """Hold what a device took against what was predicted of it.

    Args:
        predicted: as `prediction` makes it, perhaps read from a file.
        measured: any of "seconds" and "peak" (bytes), of the whole picture, and "stages", by name any of the same two.
            What it leaves out is not compared.

    Returns:
        One for each figure that both have, the whole before its stages.

    Raises:
        RequestError: it has something that no prediction has, so that a misspelt figure is not passed over.
    """
    _refuse_unknown(measured, ("seconds", "peak", "stages"), "a measurement")
    stages: Mapping[str, Mapping[str, Any]] = measured.get("stages", {})
    _refuse_unknown(stages, STAGES, "'stages'")
    found = _compared("", predicted, measured)
    for name, figures in stages.items():
        _refuse_unknown(figures, ("seconds", "peak"), f"'{name}'")
        found += _compared(f"{name} ", predicted["stages"][name], figures)
    return found


def _compared(of: str, predicted: Mapping[str, Any], measured: Mapping[str, Any]) -> list[Comparison]:
    units: Sequence[tuple[str, Literal["s", "bytes"]]] = (("seconds", "s"), ("peak", "bytes"))
    return [
        Comparison(f"{of}{key}", unit, float(predicted[key]), float(measured[key]))
        for key, unit in units
        if measured.get(key) is not None and predicted.get(key) is not None
    ]


def _refuse_unknown(given: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    if unknown := [key for key in given if key not in known]:
        raise RequestError(f"{where} has {', '.join(unknown)}, where only {', '.join(known)} can be compared.")


def _short(value: float) -> float:
    return float(f"{value:.4g}")
