"""All suites of `octavo bench` with peers beside, as lines of JSON; see `octavo bench --help` for single ones.

python -m benchmarks.device                                # the embedded model on the fastest device here
python -m benchmarks.device --model medium --device cpu    # random weights of SD3.5 Medium, 256x256, minutes
"""

import argparse
import json
import tempfile
from pathlib import Path

from octavo.devices import pick_device, pick_dtype
from octavo.evaluate.bench import SUITES, Options, run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="embedded, large or medium, or a name or path")
    parser.add_argument("--device", help="the fastest if unsaid")
    parser.add_argument("--suites", nargs="+", choices=SUITES, default=SUITES)
    parser.add_argument("--repeats", type=int)
    arguments = parser.parse_args()
    device = pick_device(arguments.device)
    with tempfile.TemporaryDirectory() as folder:
        options = Options(
            model=arguments.model,
            suites=tuple(arguments.suites),
            device=device,
            dtype=pick_dtype(None, device),
            repeats=arguments.repeats,
            peers=True,
            out=Path(folder),
        )
        results = run(options)
    for entry in (*results.lines, *results.absent, *results.errors):
        print(json.dumps(entry), flush=True)


if __name__ == "__main__":
    main()
