"""Nodes that load, encode and sample are declared as ComfyUI declares them."""

import pytest

from octavo.graph.nodes import conditioning, guiders, loaders, model_edits, samplers, sampling, sigmas, text
from tests.graph.compare import differences

MINE = {
    spec.name: spec
    for module in (loaders, text, conditioning, model_edits, sampling, samplers, sigmas, guiders)
    for spec in module.NODES
}


@pytest.mark.parametrize("name", MINE)
def test_a_node_is_declared_as_comfyui_declares_it(name: str) -> None:
    assert differences(MINE[name]) == []


def test_every_node_says_what_it_is_for() -> None:
    assert [name for name, spec in MINE.items() if not spec.description] == []
