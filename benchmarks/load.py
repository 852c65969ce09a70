"""Peak memory and time of loading a checkpoint, against the model that stays resident.

A random MMDiT of about 2 GB in bfloat16 is written to disk, in FP8 too, and loaded in a process of its own for each
case: as it is, widened to float32, from FP8, and as most programs do it (read the file, then copy it into a model).
`overhead` is what the process held at its peak beyond the model itself and what it held before loading.

    python -m benchmarks.load                      # 12 blocks of SD3.5 Medium's width: 2.2 GB
    python -m benchmarks.load --depth 2            # a quick look
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from benchmarks.common import in_own_process, peak_memory, report
from octavo.checkpoint import load_mmdit
from octavo.checkpoint.save import Writer
from octavo.fp8 import quantize
from octavo.models import MMDiT, MMDiTConfig


def as_is(path: Path) -> nn.Module:
    return load_mmdit(path, dtype=torch.bfloat16)


def widened(path: Path) -> nn.Module:
    return load_mmdit(path, dtype=torch.float32)


def the_usual_way(path: Path) -> nn.Module:
    """Build the model, read the whole file, copy."""
    tensors = load_file(path)
    depth = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("joint_blocks."))
    model = MMDiT(config(depth)).to(torch.bfloat16)
    model.load_state_dict(tensors)
    return model


# By case: the file, and how it is loaded.
CASES: Mapping[str, tuple[str, Callable[[Path], nn.Module]]] = {
    "bfloat16": ("bf16.safetensors", as_is),
    "bfloat16_to_float32": ("bf16.safetensors", widened),
    "fp8": ("fp8.safetensors", as_is),
    "usual_way": ("bf16.safetensors", the_usual_way),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=12, help="joint blocks")
    parser.add_argument("--folder", type=Path, help="where to write the files; a temporary folder if not given")
    parser.add_argument("--load", nargs=2, metavar=("CASE", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        print(json.dumps(weigh(*CASES[options.load[0]], Path(options.load[1]))))
        return

    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        write_files(Path(folder), config(options.depth))
        for case, (file, _) in CASES.items():
            weighed = in_own_process("benchmarks.load", ["--load", case, folder])
            file_bytes = (Path(folder) / file).stat().st_size
            overhead = weighed["peak"] - weighed["before"] - weighed["model"]
            report(f"load.{case}.overhead", "MB", overhead / 1e6, file_bytes=file_bytes, **weighed)


def config(depth: int) -> MMDiTConfig:
    """SD3.5 Medium with so many blocks, without second attention, and with SD3's table of positions."""
    return MMDiTConfig(depth=depth, width=1536, heads=24)


def weigh(file: str, load: Callable[[Path], nn.Module], folder: Path) -> dict[str, float]:
    """Bytes held before loading, at the peak and by the model afterwards; seconds it took, the file being cached."""
    before = peak_memory()
    start = time.perf_counter()
    model = load(folder / file)
    seconds = time.perf_counter() - start
    kept = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    return {"before": before, "peak": peak_memory(), "model": kept, "seconds": round(seconds, 2)}


def write_files(folder: Path, shape: MMDiTConfig) -> None:
    """The same random weights in bfloat16 and with the blocks' matrices in FP8 scaled by row, one at a time."""
    with torch.device("meta"):
        state = MMDiT(shape).state_dict()
    names = {name: tuple(tensor.shape) for name, tensor in state.items()}
    matrices = {name for name in names if name.startswith("joint_blocks.") and name.endswith(".weight")}
    matrices = {name for name in matrices if len(names[name]) == 2}
    sixteen = {name: (torch.bfloat16, side) for name, side in names.items()}
    eight = sixteen | {name: (torch.float8_e4m3fn, names[name]) for name in matrices}
    eight |= {f"{name}_scale": (torch.float32, (names[name][0], 1)) for name in matrices}
    with Writer(folder / "bf16.safetensors", sixteen) as wide, Writer(folder / "fp8.safetensors", eight) as narrow:
        for name, side in names.items():
            tensor = torch.randn(side, dtype=torch.bfloat16)
            wide.write(name, tensor)
            if name in matrices:
                scaled = quantize(tensor, granularity="row")
                narrow.write(name, scaled.q)
                narrow.write(f"{name}_scale", scaled.scale)
            else:
                narrow.write(name, tensor)


if __name__ == "__main__":
    main()
