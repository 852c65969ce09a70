"""The whole GPU set in one go, inside eight minutes, with nothing to download: right first, then fast.

    PYTHONPATH=src python3 -m benchmarks.gpu --out runs/bench/gpu        # on a machine with torch and a GPU
    python -m benchmarks.gpu --cpu-rehearsal --out runs/bench/rehearsal  # the same script with tiny shapes, in a minute

Sections run in processes of their own, the most valuable first, each with a share of the time: a kernel that crashes or
hangs costs its section and no other. Whatever a section had found when it ended is kept. `gpu.json` is written anew
after each of them, with a plot (`gpu.svg`) and the sections' output (`gpu.log`) beside it; the last line on standard
output is a summary in JSON.
"""

import argparse
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.predicted import beside

MINUTES = 7.6  # of the eight; the rest is for Python's start and the last file
ENDING = 12.0  # seconds that a section gets to end by itself when its time is up
TAIL = 4000  # letters of a section's output that go into the JSON
OCTAVO = [sys.executable, "-c", "from octavo.cli.main import main; main()"]
# Tests that use the GPU where there is one, and run interpreted or on the CPU elsewhere.
GPU_TESTS = ("tests/fp8/test_kernels.py", "tests/fp8/test_fused_kernels.py", "tests/fp8/test_attention.py")


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the set.

    Attributes:
        name: for the results.
        command: run in a process of its own; {out} and {seconds} are filled in.
        seconds: its share of the time.
    """

    name: str
    command: tuple[str, ...]
    seconds: float


def bench(*words: str, model: str) -> tuple[str, ...]:
    """The command of `octavo bench` with these suites and options."""
    return (*OCTAVO, "bench", "--model", model, "--out", "{out}", "--seconds", "{seconds}", *words)


def suites(*names: str) -> tuple[str, ...]:
    return tuple(word for name in names for word in ("--suite", name))


def sections() -> Iterator[Section]:
    """On a GPU, the most valuable first."""
    checks = (sys.executable, "-m", "benchmarks.gpu_checks", "--out", "{out}", "--seconds", "{seconds}")
    yield Section("checks", (*checks, "--model", "large"), 100)  # compiles kernels, and times ways to multiply
    yield Section("step_large", bench(*suites("step"), model="large"), 60)
    yield Section("picture_large", bench(*suites("picture"), "--repeats", "3", model="large"), 60)
    yield Section("tests", tests(*GPU_TESTS), 60)
    yield Section("memory_large", bench(*suites("memory"), model="large"), 50)
    yield Section("cold_large", bench(*suites("cold"), "--repeats", "1", model="large"), 70)
    yield Section("medium", bench(*suites("step", "picture"), "--repeats", "5", model="medium"), 50)
    yield Section("peers", bench(*suites("step"), "--peers", "--compile", "--repeats", "5", model="large"), 100)
    yield Section("kernels_large", bench(*suites("kernels"), model="large"), 40)
    attention = ("benchmarks.attention", "--device", "cuda", "--times", "--no-pictures")
    yield Section("attention", (sys.executable, "-m", *attention), 40)
    yield Section("peer_pictures", bench(*suites("picture"), "--peers", "--repeats", "3", model="large"), 100)
    yield Section("memory_medium", bench(*suites("memory"), model="medium"), 40)


def rehearsal() -> Iterator[Section]:
    """The same sections, tiny and on the CPU."""
    checks = (sys.executable, "-m", "benchmarks.gpu_checks", "--out", "{out}", "--seconds", "{seconds}")
    tiny = ("--device", "cpu", "--size", "64x64", "--steps", "1", "--repeats", "1")
    yield Section("checks", (*checks, "--model", "embedded", "--size", "64", "--device", "cpu"), 20)
    every = ("step", "picture", "memory", "kernels", "cold")
    yield Section("embedded", bench(*suites(*every), *tiny, "--peers", model="embedded"), 30)
    yield Section("tests", tests("tests/fp8/test_scale.py"), 20)
    # What goes wrong is part of the rehearsal: it is recorded, and the set goes on.
    yield Section("broken", (sys.executable, "-c", "raise RuntimeError('as a kernel may fail')"), 10)
    yield Section("hanging", (sys.executable, "-c", "import time; time.sleep(60)"), 0.5)


def tests(*paths: str) -> tuple[str, ...]:
    """pytest on these files, as far as they are there; without plugins and options that a machine may lack."""
    there = [path for path in paths if Path(path).exists()]
    plain = ("-o", "addopts=--import-mode=importlib", "-p", "no:cacheprovider", "-W", "default", "-q")
    return (sys.executable, "-m", "pytest", *plain, *there)


def run(section: Section, folder: Path, left: float) -> dict[str, Any]:
    """Run one section; what it did, and what it left in its log."""
    from octavo.evaluate.bench_results import read_log

    out, seconds = folder / section.name, min(section.seconds, left)
    out.mkdir()
    filled = {"{out}": str(out), "{seconds}": f"{seconds:.1f}"}
    command = [filled.get(word, word) for word in section.command]
    began, timed_out = time.monotonic(), False
    with (folder / f"{section.name}.txt").open("w+", encoding="utf-8", errors="replace") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, env=_environment(folder)
        )
        try:
            process.wait(seconds + min(ENDING, section.seconds))
        except subprocess.TimeoutExpired:
            timed_out = True
            os.killpg(process.pid, signal.SIGKILL)  # with the processes that it has started
            process.wait()
        output.seek(0)
        text = output.read()
    return {
        "name": section.name,
        "command": " ".join(command),
        "seconds": round(time.monotonic() - began, 1),
        "exit": process.returncode,
        "timed_out": timed_out,
        "output": text,
        **read_log(out / "bench.jsonl"),
        "printed": [json.loads(line) for line in text.splitlines() if line.startswith('{"name"')],
    }


def _environment(folder: Path) -> dict[str, str]:
    paths = [str(Path(__file__).resolve().parents[1] / "src"), os.environ.get("PYTHONPATH", "")]
    # One cache for all sections: what was timed once is not timed again.
    cache = os.environ.get("OCTAVO_CACHE", str(folder / "cache"))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OCTAVO_CACHE": cache}


def write(out: Path, head: dict[str, Any], ran: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """`gpu.json`, `gpu.svg` and `gpu.log` of all that ran so far; the JSON's content."""
    from octavo.evaluate.bench_plot import bar_chart

    keys = ("lines", "absent", "errors", "printed", "output")
    page = {
        **head,
        "sections": [
            {**{key: value for key, value in each.items() if key not in keys}, "tail": each["output"][-TAIL:]}
            for each in ran
        ],
        **{key: [entry for each in ran for entry in each[key]] for key in ("lines", "absent", "errors", "printed")},
    }
    files = {
        "gpu.json": json.dumps(page, indent=1) + "\n",
        "gpu.svg": bar_chart(f"{head['device']}: share of the measured ceiling", page["lines"]) + "\n",
        "gpu.log": "".join(f"===== {each['name']}\n{each['output']}\n" for each in ran),
    }
    for name, text in files.items():
        (out / name).write_text(text, "utf-8")
    return page


def summary(page: dict[str, Any]) -> dict[str, Any]:
    """The last line: how much worked, and the figures that matter most."""
    found = {line["name"]: line for line in page["lines"]}
    failed = [each["name"] for each in page["sections"] if each["exit"] != 0]
    checks = [line for line in page["lines"] if line["name"].startswith("check.") and "ok" in line["conditions"]]
    medians = {name: line["median"] for name, line in found.items() if name.startswith(("step.", "picture.", "cold."))}
    whole = [medians.get(f"picture.large.{kind}.whole") for kind in ("bfloat16", "fp8")]
    measured = {name: line["median"] for name, line in found.items()}
    if whole[0] and whole[1]:
        measured["picture.large.fp8_over_bfloat16"] = whole[1] / whole[0]
    return {
        "device": page["device"],
        "seconds": page["seconds"],
        "sections": len(page["sections"]),
        "sections_failed": failed,
        "lines": len(page["lines"]),
        "errors": [error["name"] for error in page["errors"]],
        "checks": len(checks),
        "checks_failed": [line["name"] for line in checks if not line["conditions"]["ok"]],
        "fp8_over_bf16_picture": round(whole[0] / whole[1], 3) if whole[0] and whole[1] else None,
        "medians": {name: value for name, value in medians.items() if name.count(".") <= 3},
        "beside_predicted": beside(page["device"], measured),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/gpu"))
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for everything")
    parser.add_argument("--only", nargs="+", help="these sections")
    parser.add_argument("--cpu-rehearsal", action="store_true", help="tiny shapes on the CPU, to see that all runs")
    options = parser.parse_args()
    began = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)

    import torch

    from octavo.devices import device_name, pick_device
    from octavo.errors import RequestError
    from octavo.evaluate.bench_results import FORM, versions
    from octavo.evaluate.machine import describe_machine

    try:
        device = torch.device("cpu") if options.cpu_rehearsal else pick_device("cuda")
    except RequestError as error:
        sys.exit(f"{error} --cpu-rehearsal runs the set with tiny shapes on the CPU.")
    every = rehearsal() if options.cpu_rehearsal else sections()
    chosen = [each for each in every if options.only is None or each.name in options.only]
    head: dict[str, Any] = {
        "form": FORM,
        "command": " ".join(sys.argv),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device_name(device),
        "machine": describe_machine(device),
        "versions": versions(),
    }
    ran: list[dict[str, Any]] = []
    page = write(options.out, head | {"seconds": 0.0, "skipped": []}, ran)
    with tempfile.TemporaryDirectory() as folder:
        for place, section in enumerate(chosen):
            left = 60 * options.minutes - (time.monotonic() - began) - ENDING
            skipped = [each.name for each in chosen[place:]] if left <= 0 else []
            if not skipped:
                print(f"{section.name} …", flush=True)
                ran.append(run(section, Path(folder), left))
            taken = {"seconds": round(time.monotonic() - began, 1), "skipped": skipped}
            page = write(options.out, head | taken, ran)
            if skipped:
                break
    print(json.dumps(summary(page)))


if __name__ == "__main__":
    main()
