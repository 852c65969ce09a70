"""Triton's kernels run in its interpreter where there is no GPU; that has to be settled before triton is imported."""

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured times of tests are no one else's business."""
    monkeypatch.setenv("OCTAVO_CACHE", str(tmp_path / "cache"))
