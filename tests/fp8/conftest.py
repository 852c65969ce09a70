"""For tests of FP8: a cache of their own."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured times of tests are no one else's business."""
    monkeypatch.setenv("OCTAVO_CACHE", str(tmp_path / "cache"))
