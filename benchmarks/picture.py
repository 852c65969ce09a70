"""From the command to a picture, with the embedded model: the whole wall clock, and where it goes.

Each repeat is a process of its own, as a user starts it; the stages are taken inside further ones.

    python -m benchmarks.picture                  # 5 repeats
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

PROMPT = "a large red star on a blue background"
COMMAND = [sys.executable, "-c", "from octavo.cli.main import main; main()"]


def stages() -> None:
    """Seconds to import, load, encode, denoise and decode one picture in this process, as one line of JSON."""
    marks = {"start": time.perf_counter()}
    from octavo import GenerateRequest, generate, load
    from octavo.pipeline.generate import Progress

    marks["import"] = time.perf_counter()
    components = load()
    for part in (*components.encoders, components.mmdit, components.vae):
        part()
    marks["load"] = time.perf_counter()

    def watch(progress: Progress) -> None:
        if progress.stage == "denoise" and progress.step == 0:
            marks["encode"] = time.perf_counter()
        if progress.stage == "decode":
            marks["denoise"] = time.perf_counter()

    generate(components, GenerateRequest(prompt=PROMPT, seed=1), watch=watch)
    marks["decode"] = time.perf_counter()
    names = list(marks)
    print(json.dumps({name: marks[name] - marks[before] for before, name in pairwise(names)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--stages", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stages:
        stages()
        return
    # Not at the top: the process that takes the stages times the import of torch, which this brings along.
    from benchmarks.common import Timing, in_own_process, report

    for name, words in (("octavo_help", ["--help"]), ("octavo_generate", ["generate", PROMPT, "--seed", "1"])):
        seconds = []
        with tempfile.TemporaryDirectory() as folder:
            for _ in range(1 + arguments.repeats):  # the first brings the files into the page cache
                start = time.perf_counter()
                subprocess.run([*COMMAND, *words], cwd=Path(folder), check=True, capture_output=True)
                seconds.append(time.perf_counter() - start)
        report(name, "s", Timing(tuple(seconds[1:])), what="whole process, wall clock")
    inside = [in_own_process("benchmarks.picture", ["--stages"]) for _ in range(arguments.repeats)]
    for stage in inside[0]:
        report(f"octavo_generate_{stage}", "s", Timing(tuple(each[stage] for each in inside)))


if __name__ == "__main__":
    main()
