"""Peak memory and time of `octavo quantize` on a checkpoint that is larger than what it may use.

A random MMDiT of about 2 GB in bfloat16 is written to disk with small text encoders and a small VAE, and quantized in a
process of its own for each recipe, its blocks read when needed. The promise is

    peak ≤ largest block + calibration buffers + 1 GB

where the block counts in the arithmetic's float32, and the buffers are what the calibration's size decides: covariances
of a block's inputs, hidden states of all points. `overhead` is what the process held beyond these and beyond what it
held before; it is to stay below 1000 MB. One line more tells whether a job that was killed goes on to the same bytes.

    python -m benchmarks.quantize                  # 12 blocks of SD3.5 Medium's width: 2.2 GB
    python -m benchmarks.quantize --depth 2        # a quick look
"""

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from benchmarks.common import in_own_process, peak_memory, report
from octavo.checkpoint.save import Writer, save_safetensors
from octavo.compress.blocks import BlockStream
from octavo.compress.job import quantize_checkpoint
from octavo.compress.points import Points
from octavo.compress.progress import Progress
from octavo.compress.settings import QuantizeSettings
from octavo.compress.stages import Batch
from octavo.models import VAE, ClipConfig, ClipTextEncoder, MMDiT, MMDiTConfig, T5Config, T5Encoder, VAEConfig
from octavo.text import word_level_tokenizer

RECIPES = ("row", "best", "comfy")
WORDS = ("a", "the", "of", "in", "on", "with")
PROMPTS = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=12, help="joint blocks")
    parser.add_argument("--recipes", default=",".join(RECIPES), help="with commas between")
    parser.add_argument("--folder", type=Path, help="where to write the files; a temporary folder if not given")
    parser.add_argument("--run", nargs=3, metavar=("RECIPE", "TREE", "OUT"), help=argparse.SUPPRESS)
    parser.add_argument("--kill-at", type=float, default=2.0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        recipe, tree, out = options.run
        print(json.dumps(weigh(recipe, Path(tree), Path(out), options.kill_at)))
        return

    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        tree = Path(folder) / "models"
        source_bytes = write_tree(tree, options.depth)
        for recipe in options.recipes.split(","):
            out = Path(folder) / f"{recipe}.safetensors"
            weighed = in_own_process("benchmarks.quantize", ["--run", recipe, str(tree), str(out)])
            allowed = weighed["block"] + weighed["buffers"]
            overhead = weighed["peak"] - weighed["before"] - allowed
            report(f"quantize.{recipe}.overhead", "MB", overhead / 1e6, file_bytes=source_bytes, **weighed)
            report(f"quantize.{recipe}.resumed", "same bytes", same_when_killed(recipe, tree, out))
            out.unlink()


def same_when_killed(recipe: str, tree: Path, whole: Path) -> bool:
    """Kill the job (SIGKILL) when half is written, start it again, and compare."""
    out = whole.with_stem(f"{recipe}-killed")
    words = [sys.executable, "-m", "benchmarks.quantize", "--run", recipe, str(tree), str(out)]
    killed = subprocess.run([*words, "--kill-at", "0.5"], check=False, stdout=subprocess.DEVNULL)
    assert killed.returncode == -signal.SIGKILL, killed
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    same = digest(out) == digest(whole)
    out.unlink()
    return same


def weigh(recipe: str, tree: Path, out: Path, kill_at: float) -> dict[str, float]:
    """Bytes held before and at the peak; those of the largest block and of the calibration's buffers; seconds."""
    buffers = watch_buffers()

    def watch(progress: Progress) -> None:
        if progress.phase == "write" and progress.done > kill_at * progress.total:
            os.kill(os.getpid(), signal.SIGKILL)

    settings = QuantizeSettings(
        recipe=recipe,
        calibration_size=PROMPTS,
        steps=4,
        width=256,
        height=256,
        gate=0,
        device="cpu",
        low_memory=True,
        models_dir=tree,
    )
    before, start = peak_memory(), time.perf_counter()
    quantize_checkpoint("random", out, settings, watch=watch)
    seconds = time.perf_counter() - start
    return {"before": before, "peak": peak_memory(), **buffers, "seconds": round(seconds, 1)}


def watch_buffers() -> dict[str, float]:
    """Bytes of the largest stage in float32, and most that batches and covariances of one stage come to; filled in."""
    sizes = {"block": 0.0, "buffers": 0.0}
    batches_of = Points.batches
    advance = BlockStream.advance
    held = {"batches": 0.0}

    def batches(self: Points, *args: object, **given: object) -> list[Batch]:
        found = batches_of(self, *args, **given)  # type: ignore[arg-type]
        width = 1536
        # Hidden states before and after a block.
        tokens = sum(len(b.sigma) * (b.context.shape[1] + b.latents[0, 0].numel() // 4) for b in found)
        held["batches"] = 2 * 4.0 * tokens * width + sum(4.0 * b.latents.numel() for b in found)
        return found

    def watched(self: BlockStream, stage: str, *args: object, **given: object) -> None:
        linears = [self.model.get_submodule(name) for name in self.linears(stage)]
        parameters = [p for linear in linears for p in linear.parameters()]
        sizes["block"] = max(sizes["block"], 4.0 * sum(p.numel() for p in parameters))
        covariances = sum(4.0 * linear.in_features**2 for linear in linears if isinstance(linear, nn.Linear))
        sizes["buffers"] = max(sizes["buffers"], held["batches"] + covariances)
        advance(self, stage, *args, **given)  # type: ignore[arg-type]

    Points.batches = batches  # type: ignore[method-assign]
    BlockStream.advance = watched  # type: ignore[method-assign]
    return sizes


def write_tree(tree: Path, depth: int) -> int:
    """A models tree with the random model; its file's bytes."""
    torch.manual_seed(0)
    config = MMDiTConfig(depth=depth, width=1536, heads=24, context_width=128, pooled_width=128)
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in MMDiT(config).state_dict().items()}
    vae = VAE(VAEConfig(channels=(16, 16, 16, 16), layers_per_block=1, groups=4)).state_dict()
    layout = {f"model.diffusion_model.{name}": (torch.bfloat16, shape) for name, shape in shapes.items()}
    layout |= {f"first_stage_model.{name}": (torch.bfloat16, tuple(t.shape)) for name, t in vae.items()}
    path = tree / "checkpoints" / "random.safetensors"
    with Writer(path, layout) as writer:
        for name, shape in shapes.items():
            spread = 1.0 if name.endswith(("ln_q.weight", "ln_k.weight")) else shape[-1] ** -0.5
            writer.write(f"model.diffusion_model.{name}", (spread * torch.randn(shape)).bfloat16())
        for name, tensor in vae.items():
            writer.write(f"first_stage_model.{name}", tensor.bfloat16())
    write_encoders(tree / "text_encoders")
    return path.stat().st_size


def write_encoders(folder: Path) -> None:
    rows = 4 + len(WORDS)
    clip = {"width": 64, "layers": 2, "heads": 1, "mlp_width": 64, "vocab_size": rows, "positions": 77}
    encoders: dict[str, nn.Module] = {
        "clip_l": ClipTextEncoder(ClipConfig(activation="quick_gelu", **clip)),
        "clip_g": ClipTextEncoder(ClipConfig(activation="gelu", projection=64, **clip)),
        "t5xxl": T5Encoder(T5Config(width=128, layers=1, heads=2, head_width=64, mlp_width=64, vocab_size=rows)),
    }
    for name, encoder in encoders.items():
        weights = {key: tensor.half() for key, tensor in encoder.state_dict().items()}
        save_safetensors(folder / f"{name}.safetensors", weights, {"octavo.config": f'{{"kind": "{name}"}}'})
        tokenizer = word_level_tokenizer(WORDS, start=None if name == "t5xxl" else "<start>")
        tokenizer.save(str(folder / f"{name}.tokenizer.json"))


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    main()
