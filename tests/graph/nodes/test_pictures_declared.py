"""Nodes for latents, pictures, masks, files and values are declared as ComfyUI declares them."""

import pytest

from octavo.graph.nodes import NODES, image, image_effects, inout, latent, mask, primitives, vae
from tests.goldens import golden
from tests.graph.compare import FixedLists, differences, recorded_nodes

MODULES = (latent, vae, image, image_effects, mask, inout, primitives)
MINE = {spec.name: spec for module in MODULES for spec in module.NODES}
UNRECORDED = {"PrimitiveFloat", "PrimitiveBoolean", "PrimitiveStringMultiline"}
OF_THE_PAGE = {"Note", "MarkdownNote", "PrimitiveNode", "Reroute"}


@pytest.mark.parametrize("name", sorted(MINE.keys() - UNRECORDED - OF_THE_PAGE))
def test_a_node_is_declared_as_comfyui_declares_it(name: str) -> None:
    assert differences(MINE[name]) == []


@pytest.mark.parametrize("name", sorted(UNRECORDED))
def test_a_node_without_a_recording_differs_from_its_kin_in_its_names_alone(name: str) -> None:
    ours, kin = MINE[name].object_info(FixedLists()), recorded_nodes()["PrimitiveInt"]
    own = {"input", "output", "output_name", "name", "display_name", "description"}
    assert list(ours) == list(kin)
    assert {key: value for key, value in ours.items() if key not in own} == {
        key: value for key, value in kin.items() if key not in own
    }


def test_nodes_of_the_web_page_are_known_but_not_listed() -> None:
    assert {name for name, spec in NODES.items() if not spec.listed} == OF_THE_PAGE


def test_only_nodes_that_comfyui_has_are_listed() -> None:
    import json

    theirs = json.loads(golden("comfyui/object_info.json").read_text())["all_node_names"]
    assert {name for name, spec in NODES.items() if spec.listed} <= set(theirs)


def test_every_node_says_what_it_is_for() -> None:
    assert [name for name, spec in MINE.items() if not spec.description] == []
