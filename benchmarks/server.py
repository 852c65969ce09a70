"""The server: how soon it answers, what it adds to a step, and what many requests gain from one another.

With the embedded model on the CPU; the figures about the server go through `octavo serve` in a process of its own.

    python -m benchmarks.server                        # everything, five repeats
    python -m benchmarks.server --only engine          # without HTTP
    python -m benchmarks.server --repeats 1            # a quick look
"""

import argparse

from benchmarks.server_engine import measure_engine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", choices=("engine", "http"), help="one half alone")
    arguments = parser.parse_args()
    if arguments.only != "http":
        measure_engine(arguments.repeats)
    if arguments.only != "engine":
        from benchmarks.server_http import measure_http

        measure_http(arguments.repeats)


if __name__ == "__main__":
    main()
