"""One thread and no gradients for every test: small tensors run faster so, and results do not vary with the machine."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _single_threaded_and_without_gradients(request: pytest.FixtureRequest) -> Iterator[None]:
    torch.set_num_threads(1)
    with torch.set_grad_enabled(request.node.get_closest_marker("gradients") is not None):
        yield
