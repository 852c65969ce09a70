"""A model need not fit into memory to be quantized: peak memory is a part of it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from octavo.checkpoint.save import save_safetensors
from octavo.models import MMDiT, MMDiTConfig
from tests.tiny_tree import MODEL, write_tiny_tree

PEAK = """
import json, sys, torch
from pathlib import Path
from octavo.compress.job import quantize_checkpoint
from tests.compress.small import settings

def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

torch.set_num_threads(1)
root, recipe = Path(sys.argv[1]), sys.argv[2]
# Once with a tiny model, so that what torch holds for itself is not counted.
quantize_checkpoint("tiny", root / "a.safetensors", settings(root, recipe=recipe, low_memory=True))
before = peak()
quantize_checkpoint("wide", root / "b.safetensors", settings(root, recipe=recipe, low_memory=True))
print(json.dumps(peak() - before))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(("recipe", "blocks"), [("row", 1), ("tensor", 3)])
def test_peak_memory_is_a_few_blocks(tmp_path: Path, recipe: str, blocks: int) -> None:
    """In float32 the model is 14 blocks of 25 MB; calibration needs one, what it computes and what is quantized."""
    root = write_tiny_tree(tmp_path / "models")
    width = 448
    sizes = {"context_width": MODEL.context_width, "pooled_width": MODEL.pooled_width}
    config = MMDiTConfig(depth=14, width=width, heads=7, pos_embed_size=8, **sizes)
    with torch.device("meta"):
        state = MMDiT(config).state_dict()
    torch.manual_seed(0)
    both = {f"model.diffusion_model.{name}": torch.randn(t.shape).half() * 0.02 for name, t in state.items()}
    tiny = load_file(root / "checkpoints" / "tiny.safetensors")
    both |= {name: tensor for name, tensor in tiny.items() if name.startswith("first_stage_model.")}
    save_safetensors(root / "checkpoints" / "wide.safetensors", both)
    words = [sys.executable, "-c", PEAK, str(root), recipe]
    done = subprocess.run(words, timeout=200, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    block = 4 * 36 * width**2
    assert json.loads(done.stdout.splitlines()[-1]) < (1 + blocks) * block
