"""Compile our attention for GPUs that need not be here, and tell what it would take; as `benchmarks.fused_compile`.

python -m benchmarks.attention_compile                  # 8.0, 8.9 and 9.0, the tile that each would take
python -m benchmarks.attention_compile --capability 90 --tiles
"""

import argparse
import json
from collections.abc import Iterator

from benchmarks.fused_compile import CAPABILITIES, NATIVE, Case, compiled
from octavo.fp8.attention import FP8, INT8, INT8_FP8

WIDTH = 64  # of a head


def cases(capability: int, *, tiles: bool = False) -> Iterator[Case]:
    """Every kernel as it is launched for SD3.5."""
    from octavo.fp8.kernels import attention
    from octavo.fp8.kernels.attention import TILES, Tile

    native = capability >= NATIVE
    fitting = next(tile for (major, minor), tile in TILES.items() if capability >= 10 * major + minor)
    every = [Tile(m, n, w, s) for m in (64, 128) for n in (64, 128) for w in (4, 8) for s in (2, 3)]
    for name, rounded in (("fp8", FP8), ("int8-fp8", INT8_FP8), ("int8", INT8)):
        if rounded.weights and not native:
            continue  # no FP8 units
        code, values = "i8" if rounded.integers else "u8", "u8" if rounded.weights else "bf16"
        pointers = {"q": code, "k": code, "v": values, "out": "bf16"}
        pointers |= dict.fromkeys(("q_scale", "k_scale", "v_scale"), "fp32")
        for tile in every if tiles else [fitting]:
            constants = {
                "INTEGER": rounded.integers, "WEIGHTS": rounded.weights, "NATIVE": native, "STRETCH": rounded.stretch,
                "E": WIDTH, "QUERIES": tile.queries, "KEYS": tile.keys,
            }  # fmt: skip
            yield Case(f"{name}, {tile}", attention._attend, pointers, constants, tile.warps, tile.stages)
        for kind, what in enumerate(("queries", "keys", "values")):
            if kind == 2 and not rounded.weights:
                continue
            integers = rounded.integers and kind < 2
            constants = {
                "KIND": kind, "INTEGER": integers, "NATIVE": native, "LARGEST": 127.0 if integers else 448.0,
                "TOKENS": fitting.queries if kind == 0 else fitting.keys, "E": WIDTH,
            }  # fmt: skip
            given = {"x": "bf16", "given": "fp32", "codes": "i8" if integers else "u8", "scales": "fp32"}
            yield Case(f"{name}, {what}", attention._round, given, constants, 4)


def main() -> None:
    """Print one JSON line for each kernel and processor."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, nargs="*", default=CAPABILITIES, help="such as 90")
    parser.add_argument("--tiles", action="store_true", help="all tiles, not only the one that is taken")
    given = parser.parse_args()
    for capability in given.capability:
        for case in cases(capability, tiles=given.tiles):
            figures = compiled(case, capability)
            print(json.dumps({"kernel": case.what, "capability": capability, "warps": case.warps, **figures}))


if __name__ == "__main__":
    main()
