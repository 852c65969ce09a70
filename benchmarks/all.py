"""Every benchmark, one after the other, each in a process of its own; their JSON lines go to one file a benchmark.

python -m benchmarks.all --out runs/bench
"""

import argparse
import subprocess
import sys
from pathlib import Path

BENCHMARKS = (
    "device",
    "picture",
    "embedded",
    "judge",
    "fp8_linear",
    "fp8_quality",
    "mmdit_step",
    "vae",
    "encoders",
    "load",
    "quantize",
    "server",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder of the results")
    parser.add_argument("--only", nargs="*", choices=BENCHMARKS, help="these alone")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in arguments.only or BENCHMARKS:
        print(f"{name} …", flush=True)
        done = subprocess.run(
            [sys.executable, "-m", f"benchmarks.{name}"], stdout=subprocess.PIPE, text=True, check=True
        )
        (arguments.out / f"{name}.jsonl").write_text(done.stdout, "utf-8")
        print(done.stdout, end="", flush=True)


if __name__ == "__main__":
    main()
