"""One thread and no gradients for every test: small tensors run faster so, and results do not vary with the machine.

Triton's kernels run in its interpreter where there is no GPU. That has to be settled before anything imports triton, as
parts of torch do.
"""

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Examples are not raced against a clock: machines are busy. In CI hypothesis sees to that, and draws the same ones.
if "CI" not in os.environ:
    settings.register_profile("octavo", deadline=None)
    settings.load_profile("octavo")


@pytest.fixture(autouse=True)
def _single_threaded_and_without_gradients(request: pytest.FixtureRequest) -> Iterator[None]:
    torch.set_num_threads(1)
    with torch.set_grad_enabled(request.node.get_closest_marker("gradients") is not None):
        yield
