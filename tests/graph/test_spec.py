"""Declarations become ComfyUI's entries of `/object_info`."""

from typing import Any

import pytest

from octavo.graph.spec import COMBO, INT, LINK, NodeSpec, node
from tests.graph.compare import FixedLists, declared, differences, recorded_nodes

NOWHERE = FixedLists()


# The first's choices are fetched by the web page from a route of the server; the second writes its lack of options out.
ELSEWISE = {"LoadImageOutput", "PreviewAny"}


def test_every_recorded_entry_can_be_declared():
    for name in set(recorded_nodes()) - ELSEWISE:
        entry = recorded_nodes()[name]

        ours = declared(entry).object_info(NOWHERE)

        assert ours == entry
        assert list(ours) == list(entry)
        assert [list(ours["input"][s]) for s in ours["input"]] == [list(entry["input"][s]) for s in entry["input"]]


def _repeat(**changes: Any) -> NodeSpec:
    given: dict[str, Any] = {
        "category": "latent/batch",
        "display_name": "Repeat Latent Batch",
        "inputs": {"samples": LINK("LATENT"), "amount": INT(1, min=1, max=64)},
        "outputs": ("LATENT",),
    }
    return node("RepeatLatentBatch", **{**given, **changes})(lambda _context, samples, amount: (samples * amount,))


def test_a_declared_node_equals_the_recorded_one():
    assert differences(_repeat()) == []


@pytest.mark.parametrize(
    "change",
    [
        {"category": "latent"},
        {"outputs": (("LATENT", "latents"),)},
        {"outputs": ("LATENT", "MASK")},
        {"output_node": True},
        {"classic": False},
        {"module": "comfy_extras.nodes_latent", "classic": True},
        {"display_name": "Repeat"},
        {"experimental": True},
        {"inputs": {"amount": INT(1, min=1, max=64), "samples": LINK("LATENT")}},
        {"inputs": {"samples": LINK("LATENT"), "amount": INT(1, min=1, max=65)}},
        {"inputs": {"samples": LINK("LATENT"), "amount": INT(1, min=1.0, max=64)}},
        {"inputs": {"samples": LINK("LATENT"), "amount": INT(1, min=1, max=64).optional}},
        {"inputs": {"samples": LINK("IMAGE"), "amount": INT(1, min=1, max=64)}},
    ],
)
def test_the_comparison_finds_what_differs(change):
    assert differences(_repeat(**change))


def test_a_combo_of_files_follows_the_files():
    spec = node("X", category="", inputs={"name": COMBO(lambda lists: lists.names("vae"))}, outputs=())(lambda _: ())

    assert spec.object_info(FixedLists(vae=["b", "a"]))["input"]["required"]["name"] == [["b", "a"]]
    assert spec.inputs["name"].default(FixedLists(vae=["b", "a"])) == "b"
    assert spec.inputs["name"].default(NOWHERE) is None
