"""A small model to compress, and settings under which that takes a moment."""

from pathlib import Path
from typing import Any

from octavo.compress.settings import QuantizeSettings
from tests.tiny_tree import write_tiny_tree

PROMPTS = ("a red star", "a blue circle on white", "red circle on blue background")


def settings(root: Path, **given: Any) -> QuantizeSettings:
    """Two steps over three prompts at 64×64, no gate, models from `root`."""
    prompts = root / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS), "utf-8")
    quick = {"steps": 2, "width": 64, "height": 64, "prompts": prompts, "gate": 0, "device": "cpu"}
    return QuantizeSettings(models_dir=root, **{**quick, **given})


def model(root: Path) -> Path:
    """A 16-bit checkpoint with its encoders in the tree `root`."""
    return write_tiny_tree(root) / "checkpoints" / "tiny.safetensors"
