"""How near FP8 files come to the 16-bit model: recipes side by side, on the embedded model and on its stress twin.

    python -m benchmarks.fp8_quality --pictures 200 --out runs/fp8_quality

Every recipe's file is made by `octavo quantize`'s job and judged by `octavo evaluate`'s comparison: same prompts, same
seeds, inputs rounded as GPUs do (`plain-w8a8`). Finished files and pictures are kept in the folder and not made again.
"""

import argparse
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch

from benchmarks.common import report
from octavo.checkpoint.load import load_mmdit
from octavo.checkpoint.save import save_safetensors
from octavo.checkpoint.tensors import open_tensors
from octavo.compress.job import quantize_checkpoint
from octavo.compress.settings import FileForm, QuantizeSettings, readable_by_comfyui
from octavo.evaluate.columns import ModelColumn
from octavo.evaluate.comparison import ColumnResult, compare
from octavo.evaluate.prompt_set import builtin_prompts
from octavo.evaluate.report import write_report
from octavo.evaluate.stress import put_outliers_in
from octavo.pipeline.assemble import EMBEDDED_MODEL, load
from octavo.quantize import load_recipe

RECIPES = ("cast", "tensor", "row", "comfy", "static", "best")
PREFIX = "model.diffusion_model."
MEASURES = ("ssim", "distance", "latent_error", "fid", "fid_rise", "fid_rise_low", "fid_rise_high", "right_all")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--beds", nargs="+", default=["embedded", "twin"])
    parser.add_argument("--calibration-size", type=int, default=128)
    parser.add_argument("--out", type=Path, default=Path("runs/fp8_quality"))
    arguments = parser.parse_args()
    for bed in arguments.beds:
        folder = arguments.out / bed
        folder.mkdir(parents=True, exist_ok=True)
        source = EMBEDDED_MODEL if bed == "embedded" else stress_twin(folder / "twin.safetensors")
        files = {name: quantized(source, name, folder, arguments.calibration_size) for name in arguments.recipes}
        judge(bed, source, files, arguments.pictures, folder / "report")


def stress_twin(path: Path) -> Path:
    """The embedded model's stress twin as a file, in float32 so that it computes the same."""
    if not path.exists():
        mmdit = load_mmdit(EMBEDDED_MODEL)
        put_outliers_in(mmdit)
        with open_tensors(EMBEDDED_MODEL) as original:
            tensors = {name: original.read(name) for name in original.entries if not name.startswith(PREFIX)}
            metadata = original.metadata
        tensors |= {PREFIX + name: tensor for name, tensor in mmdit.state_dict().items()}
        save_safetensors(path, tensors, metadata)
    return path


def quantized(source: Path, recipe: str, folder: Path, calibration_size: int) -> Path:
    """The file that the recipe makes of `source`."""
    path = folder / f"{recipe}.safetensors"
    if not path.exists():
        form: FileForm = "comfyui" if readable_by_comfyui(load_recipe(recipe)) else "octavo"
        settings = QuantizeSettings(recipe=recipe, form=form, calibration_size=calibration_size, gate=0, force=True)
        quantize_checkpoint(source, path, settings)
    return path


def judge(bed: str, source: Path, files: Mapping[str, Path], pictures: int, folder: Path) -> None:
    """Report a line for each file; the comparison as a page goes to `folder`."""
    columns = [ModelColumn(name="16-bit", load=partial(load, source, dtype="float32"))]
    columns += [
        ModelColumn(name=name, load=partial(load, path, dtype="float32", backend="plain-w8a8"), how="plain-w8a8")
        for name, path in files.items()
    ]
    prompts = builtin_prompts(pictures, embedded=True)
    comparison = compare(columns, prompts, out=folder, command="python -m benchmarks.fp8_quality")
    write_report(comparison, folder)
    exact, *others = comparison.columns
    conditions: dict[str, object] = {"bed": bed, "pictures": pictures}
    report(
        "fp8_quality",
        "judge's score",
        exact.scores.overall["score"],
        recipe=exact.drawn.name,
        **conditions,
        **_measures(exact),
    )
    for column in others:
        told = {
            "score_change": column.scores.overall["score"] / exact.scores.overall["score"] - 1,
            **_measures(column),
            "velocity_error": None if column.drawn.velocity is None else column.drawn.velocity.whole,
            **share_in_fp8(files[column.drawn.name]),
        }
        report("fp8_quality", "dB", column.scores.overall["psnr"], recipe=column.drawn.name, **conditions, **told)


def _measures(column: ColumnResult) -> dict[str, object]:
    scores = column.scores.overall
    return {measure: round(scores[measure], 5) for measure in MEASURES if measure in scores}


def share_in_fp8(path: Path) -> dict[str, object]:
    """How many of the numbers of the diffusion model's linear layers are in FP8; branches count as theirs."""
    with open_tensors(path) as file:
        sizes = {
            name: (torch.Size(entry.shape).numel(), entry.dtype)
            for name, entry in file.entries.items()
            if name.startswith(PREFIX) and len(entry.shape) == 2 and not name.endswith("scale")
        }
    in_fp8 = sum(count for count, dtype in sizes.values() if dtype.startswith("F8"))
    return {"share_in_fp8": round(in_fp8 / sum(count for count, _ in sizes.values()), 4), "bytes": path.stat().st_size}


if __name__ == "__main__":
    main()
