"""How long each way to multiply takes on this device, measured once and kept on disk.

Times lie in `fp8-times.json` in the cache folder ($OCTAVO_CACHE, else `octavo` in $XDG_CACHE_HOME, else
`~/.cache/octavo`), by device, its threads, torch and Octavo's version; delete it to have everything measured again.
"""

import importlib.util
import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import torch

from octavo._version import __version__
from octavo.devices import device_name
from octavo.fp8.backends import Backend, UnusableError
from octavo.fp8.needs import Problem, dtype_name
from octavo.fp8.scale import BLOCK, Scaled, scale_shape

logger = logging.getLogger(__name__)

FILE = "fp8-times.json"
FORM = 1  # of the file
REPEATS = 5
CALLS = 5  # of each repeat on a GPU, one after the other, so that only the first waits for its launch
Times = dict[str, dict[str, dict[str, float]]]  # machine → shape → backend → seconds


class Timings:
    """Times of backends, from the file where it has them, else measured.

    A file that cannot be read is as good as none, and one that cannot be written costs the next process the time again.
    """

    def __init__(
        self,
        measure: Callable[[Any, Any], float] | None = None,
        *,
        file: str = FILE,
        shape: Callable[[Any], str] | None = None,
    ) -> None:
        """
        Args:
            measure: gives the time of something with a name for something that has a device; `seconds` if not given.
            file: in the cache folder.
            shape: what times of the second are kept by.
        """
        self.path = cache_folder() / file
        self._measure, self._shape = measure or seconds, shape or _shape
        self._times = _read(self.path)
        self._new: Times = {}

    def __call__(self, backend: Any, problem: Any) -> float:
        """Seconds that `backend` takes for `problem`; raises `UnusableError` where it fails."""
        machine, shape = _machine(problem), self._shape(problem)
        known = self._times.get(machine, {}).get(shape, {}).get(backend.name)
        if known is not None:
            return known
        measured = self._measure(backend, problem)
        for times in (self._times, self._new):
            times.setdefault(machine, {}).setdefault(shape, {})[backend.name] = measured
        return measured

    def save(self) -> None:
        """Add what was measured to the file, in one stroke: a reader sees the old one or the new one."""
        if not self._new:
            return
        times = _read(self.path)  # again: another process may have added to it
        for machine, shapes in self._new.items():
            for shape, found in shapes.items():
                times.setdefault(machine, {}).setdefault(shape, {}).update(found)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self.path.parent, suffix=".part", delete=False) as file:
                json.dump({"form": FORM, "seconds": times}, file, indent=1)
            os.replace(file.name, self.path)
        except OSError as error:
            logger.info("Measured times are not kept: %s", error)
            return
        self._new = {}


def cache_folder() -> Path:
    """Where Octavo keeps what it could make again."""
    if given := os.environ.get("OCTAVO_CACHE"):
        return Path(given).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "octavo"


@cache
def seconds(backend: Backend, problem: Problem) -> float:
    """Median time of `backend` for `problem`, on the first device of its type.

    Raises:
        UnusableError: it fails.
    """
    device = torch.device(problem.device)
    try:
        return _seconds(backend, problem, device)
    except _failures() as error:
        raise UnusableError(f"fails when tried: {str(error).strip().partition(chr(10))[0]}") from error


def _seconds(backend: Backend, problem: Problem, device: torch.device) -> float:
    generator = torch.Generator(device).manual_seed(0)
    # Every positive finite code occurs; subnormal ones are as rare as in weights.
    codes = torch.randint(
        problem.format.first_non_finite_code,
        (problem.N, problem.K),
        dtype=torch.uint8,
        device=device,
        generator=generator,
    )
    scale = torch.ones(scale_shape(problem.N, problem.K, problem.granularity, problem.block or BLOCK), device=device)
    weight = Scaled(codes.view(problem.format.dtype), scale, problem.block)
    if backend.twin is not None:
        weight = backend.twin(weight)
    x = torch.randn(problem.rows, problem.K, device=device, generator=generator).to(problem.dtype)
    bias = torch.zeros(problem.N, device=device, dtype=problem.dtype)
    times, calls = [], CALLS if device.type == "cuda" else 1
    with torch.inference_mode():
        backend.run(x, weight, bias, None)
        for _ in range(REPEATS):
            _wait(device)
            start = time.perf_counter()
            for _ in range(calls):
                backend.run(x, weight, bias, None)
            _wait(device)
            times.append((time.perf_counter() - start) / calls)
    return median(times)


def _failures() -> tuple[type[Exception], ...]:
    """What a kernel raises that does not run here: torch's errors, and triton's when it cannot compile."""
    if importlib.util.find_spec("triton") is None:
        return (RuntimeError,)
    from octavo.fp8.kernels.errors import TritonError

    return (RuntimeError, TritonError)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _machine(problem: Any) -> str:
    device = torch.device(problem.device)
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    return f"{device_name(device)}{threads}, torch {torch.__version__}, octavo {__version__}"


def _shape(problem: Problem) -> str:
    block = "" if problem.block is None else " of {}x{}".format(*problem.block)
    weight = f"{problem.format.name} by {problem.granularity}{block}"
    return f"{problem.rows}x{problem.K} to {problem.N}, {dtype_name(problem.dtype)}, {weight}"


def _read(path: Path) -> Times:
    """What the file holds, as far as it makes sense; nothing if it makes none."""
    try:
        held = json.loads(path.read_text("utf-8"))
        if held["form"] != FORM:
            return {}
        times = {
            machine: {
                shape: {name: float(value) for name, value in found.items() if 0 < float(value) < math.inf}
                for shape, found in shapes.items()
            }
            for machine, shapes in held["seconds"].items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        logger.info("'%s' is of no use (%s), and is made again.", path, error)
        return {}
    return times
