"""From the start of a process to its first picture, and where the time goes.

    python -m octavo.evaluate.bench_cold '{"model": null, "steps": 4, "width": 128, "height": 128}'

is that process: it draws one picture and prints seconds by stage as JSON. Its clock begins when the system started it,
so Python's own start counts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from octavo.evaluate.bench_results import Results
    from octavo.evaluate.bench_timing import Deadline

STAGES = ("python", "import", "headers", "load", "encode", "first_step", "other_steps", "decode")


def bench_cold(settings: dict[str, object], prefix: str, results: Results, *, repeats: int, deadline: Deadline) -> None:
    """A line for each stage and for the whole, each process fresh; the first, which fills the page cache, not counted.

    Args:
        settings: see `first_picture`.
    """
    # Not at the top: the process that is timed imports this module, and shall import no more than it needs.
    from octavo.errors import OctavoError
    from octavo.evaluate.bench_timing import Timing

    taken: list[dict[str, float]] = []
    command = [sys.executable, "-m", "octavo.evaluate.bench_cold", json.dumps(settings)]
    for turn in range(1 + repeats):
        if turn > 1 and deadline.passed:
            break
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise OctavoError(f"The process that draws the first picture failed:\n{done.stderr[-2000:]}")
        taken.append(json.loads(done.stdout.splitlines()[-1]))
    told = {key: value for key, value in settings.items() if key not in ("model", "device", "threads")}
    for stage in taken[0]:
        results.add(f"{prefix}.{stage}", Timing(tuple(each[stage] for each in taken[1:])), conditions=told)


def since_start() -> float:
    """Seconds since the system started this process; where it does not tell (not Linux), since `time` was imported."""
    try:
        with open("/proc/self/stat", encoding="ascii") as file:
            # Fields after the name, which may hold spaces and brackets; the 22nd of all is the start, in ticks.
            ticks = int(file.read().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        return time.perf_counter() - _IMPORTED


_IMPORTED = time.perf_counter()


def first_picture(settings: dict[str, object]) -> dict[str, float]:
    """Draw it; seconds by `STAGES`, and "whole".

    Args:
        settings: model, steps, width, height, threads if they are not torch's own; further ones go to `octavo.load`.
    """
    marks = {"python": since_start()}

    import torch

    import octavo
    from octavo.pipeline.generate import Progress

    marks["import"] = since_start()
    if "threads" in settings:
        torch.set_num_threads(int(str(settings.pop("threads"))))
    request = octavo.GenerateRequest(
        prompt="a large red star on a blue background", sampler="euler", seed=1,
        steps=int(str(settings.pop("steps"))), width=int(str(settings.pop("width"))),
        height=int(str(settings.pop("height"))),
    )  # fmt: skip
    components = octavo.load(settings.pop("model"), **settings)  # type: ignore[arg-type]  # checked there
    marks["headers"] = since_start()
    for part in (*components.encoders, components.mmdit, components.vae):
        part()
    _wait()
    marks["load"] = since_start()

    def watch(progress: Progress) -> None:
        if progress.stage == "denoise" and progress.step <= 1:
            _wait()
            marks["first_step" if progress.step else "encode"] = since_start()
        if progress.stage == "decode":
            _wait()
            marks["other_steps"] = since_start()

    octavo.generate(components, request, watch=watch)
    marks["decode"] = since_start()
    ends = [0.0, *(marks[stage] for stage in STAGES)]
    taken = {stage: end - begin for stage, begin, end in zip(STAGES, ends, ends[1:], strict=False)}
    return {**taken, "whole": marks["decode"]}


def _wait() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    print(json.dumps(first_picture(json.loads(sys.argv[1]))))
