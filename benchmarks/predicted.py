"""Figures that were measured beside those that `benchmarks.predict_aims` has stored; needs neither torch nor a GPU."""

import json
from collections.abc import Mapping
from pathlib import Path

STORED = Path("docs/benchmarks/predicted_aims.json")


def beside(device: str, measured: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Measured figures beside predicted ones of the same name; nothing where the device is not the predicted one."""
    if not STORED.exists():
        return {}
    stored = json.loads(STORED.read_text("utf-8"))
    if stored["card"] not in device:
        return {}
    return {
        name: {"predicted": value, "measured": measured[name], "ratio": float(f"{measured[name] / value:.3g}")}
        for name, value in stored["figures"].items()
        if name in measured and value
    }
