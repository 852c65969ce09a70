"""What a benchmark found: lines with their conditions, kept as they come, and one JSON file of all in the end.

A line tells what was measured, its median and 95th percentile, and beside a time the least that the work could take by
the ceilings that were measured on the same device in the same run: `fraction` is how near it came.
"""

from __future__ import annotations

import datetime
import json
import platform
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

import torch

from octavo._version import __version__
from octavo.devices import device_name
from octavo.errors import OctavoError
from octavo.evaluate.bench_timing import Timing
from octavo.evaluate.machine import describe_machine

FORM = 1  # of the JSON file
PACKAGES = ("torch", "triton", "diffusers", "transformers", "torchao")


class Results:
    """Lines, what was left out and why, and what failed; each is written to `log` at once, if there is one.

    Attributes:
        lines: measured figures.
        absent: what could not be measured here: name and reason.
        errors: what failed, with its traceback; work goes on after it.
    """

    def __init__(self, device: torch.device, log: TextIO | None = None) -> None:
        self.device, self._log = device, log
        self.lines: list[dict[str, Any]] = []
        self.absent: list[dict[str, str]] = []
        self.errors: list[dict[str, str]] = []
        self._common = {"device": device_name(device), "torch": torch.__version__, "octavo": __version__}

    def add(
        self,
        name: str,
        value: Timing | float,
        unit: str = "s",
        conditions: Mapping[str, object] | None = None,
        *,
        bound: float | None = None,
        repeats: int = 1,
    ) -> None:
        """One figure.

        Args:
            name: dotted, the suite first: `step.large.fp8.eager`.
            value: a timing, or a single number.
            unit: of it; "s" for seconds, "x" for one time over another.
            conditions: sizes, dtypes, backends: whatever one must know to measure it again.
            bound: seconds that the work would take at the measured ceilings.
            repeats: where a single number stands for several.
        """
        middle, p95 = (value.median, value.p95) if isinstance(value, Timing) else (value, value)
        count = len(value.seconds) if isinstance(value, Timing) else repeats
        line: dict[str, Any] = {"name": name, "unit": unit, "median": _short(middle), "p95": _short(p95)}
        line["repeats"] = count
        if bound is not None:
            line["bound"], line["fraction"] = _short(bound), _short(bound / middle)
        line |= {"conditions": dict(conditions or {}), **self._common, "date": _now()}
        self.lines.append(line)
        self._write({"line": line})

    def leave_out(self, name: str, reason: str) -> None:
        """Say that `name` is not measured, and why."""
        self.absent.append({"name": name, "reason": reason})
        self._write({"absent": self.absent[-1]})

    @contextmanager
    def guarded(self, name: str) -> Iterator[None]:
        """Keep what fails inside as an error under `name`, and go on. Only the user's interrupt passes."""
        try:
            yield
        except OctavoError as error:
            self.leave_out(name, str(error))
        # A figure that cannot be had must not cost the others: the traceback is part of the result.
        except Exception as error:
            # Not the frames themselves, which would keep the failed attempt's tensors in memory.
            self.errors.append(
                {
                    "name": name,
                    "error": f"{type(error).__name__}: {error!s:.500}",
                    "traceback": traceback.format_exc(),
                }
            )
            self._write({"failed": self.errors[-1]})

    def median(self, name: str) -> float | None:
        """Of the line called `name`; None where it was not measured."""
        return next((float(line["median"]) for line in self.lines if line["name"] == name), None)

    def as_json(self, command: str = "") -> dict[str, Any]:
        """Everything, as plain data."""
        return {
            "form": FORM,
            "command": command,
            "date": _now(),
            "device": device_name(self.device),
            "machine": describe_machine(self.device),
            "versions": versions(),
            "lines": self.lines,
            "absent": self.absent,
            "errors": self.errors,
        }

    def _write(self, what: dict[str, Any]) -> None:
        if self._log is not None:
            self._log.write(json.dumps(what) + "\n")
            self._log.flush()


def read_log(path: Path) -> dict[str, list[dict[str, Any]]]:
    """What a run had written to its log, as `lines`, `absent` and `errors`, even if it was stopped amid a line."""
    found: dict[str, list[dict[str, Any]]] = {"lines": [], "absent": [], "errors": []}
    places = {"line": "lines", "absent": "absent", "failed": "errors"}
    for text in path.read_text("utf-8").splitlines() if path.exists() else ():
        try:
            entry = json.loads(text)
        except ValueError:
            continue  # the last line of a run that was killed
        for kind, place in places.items():
            if kind in entry:
                found[place].append(entry[kind])
    return found


def versions() -> dict[str, str]:
    """Of Python, Octavo and the packages that matter to speed, as far as they are installed."""
    found = {"python": platform.python_version(), "octavo": __version__}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _short(value: float) -> float:
    return float(f"{value:.4g}")
