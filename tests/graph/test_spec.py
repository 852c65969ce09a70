"""Declarations become ComfyUI's entries of `/object_info`."""

from typing import Any

import pytest

from octavo.graph.spec import COMBO, INT, LINK, Input, NodeSpec, node
from tests.graph.compare import FixedLists, differences, recorded_nodes

NOWHERE = FixedLists()


def _declared(entry: dict[str, Any]) -> NodeSpec:
    """What an author would write for a recorded entry."""
    classic = "output_matchtypes" not in entry
    inputs = {}
    for section, names in entry["input"].items():
        for name, given in names.items():
            if section == "hidden":
                inputs[name] = Input(type=given, section="hidden")
                continue
            kind, options = given[0], dict(given[1]) if len(given) > 1 else {}
            choices = tuple(kind) if isinstance(kind, list) else None
            # One node lists files of a server's folder: a COMBO whose options the web page fetches.
            if kind == "COMBO" and "options" in options:
                options.pop("multiselect")
                choices = tuple(options.pop("options"))
            kind = "COMBO" if isinstance(kind, list) else kind
            inputs[name] = Input(type=kind, options=options, choices=choices, section=section)
    return NodeSpec(
        name=entry["name"],
        category=entry["category"],
        inputs=inputs,
        outputs=tuple(zip(entry["output"], entry["output_name"], strict=True)),
        run=lambda _context: (),
        display_name=entry["display_name"],
        description=entry["description"],
        module=entry["python_module"],
        classic=classic,
        output_node=entry["output_node"],
        output_tooltips=tuple(t for t in entry.get("output_tooltips", ()) if t),
        search_aliases=tuple(entry["search_aliases"] or ()),
        deprecated=entry.get("deprecated", False),
        experimental=entry.get("experimental", False),
    )


# The first's choices are fetched by the web page from a route of the server; the second writes its lack of options out.
ELSEWISE = {"LoadImageOutput", "PreviewAny"}


def test_every_recorded_entry_can_be_declared():
    for name in set(recorded_nodes()) - ELSEWISE:
        entry = recorded_nodes()[name]

        ours = _declared(entry).object_info(NOWHERE)

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
