"""Where tests find the recorded outputs of other implementations."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PLACES = (ROOT.parent / "shared" / "golden", ROOT / "tests" / "golden")


def golden(name: str) -> Path:
    """The recorded file or folder `name`, such as `comfyui/sigmas.json`; skips the test where there is none."""
    for place in PLACES:
        if (place / name).exists():
            return place / name
    pytest.skip(f"golden '{name}' is neither in ../shared/golden nor in tests/golden")
