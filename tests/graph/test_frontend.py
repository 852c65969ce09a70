"""What the web page saves becomes the prompt that it would have sent."""

import copy
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.graph.frontend import is_frontend_format, to_prompt
from octavo.graph.spec import COMBO, FLOAT, INT, LINK, STRING, files, node
from octavo.graph.workflow import InvalidPrompt
from tests.goldens import golden
from tests.graph.compare import FixedLists, declared, recorded_nodes
from tests.graph.test_workflow import JSON

LISTS = FixedLists(checkpoints=["a.safetensors"], input=["example.png"])


def _nothing(_context: Any, **_: Any) -> tuple[Any, ...]:
    return ()


SEED = INT(0, min=0, max=100, control_after_generate=True)
SPECS = {
    spec.name: spec
    for spec in (
        node("Load", category="", inputs={"name": COMBO(files("checkpoints"))}, outputs=("MODEL", "CLIP"))(_nothing),
        node(
            "Text", category="", inputs={"text": STRING(dynamicPrompts=True), "clip": LINK("CLIP")}, outputs=("COND",)
        )(_nothing),
        node(
            "Sample",
            category="",
            inputs={"model": LINK("MODEL"), "seed": SEED, "steps": INT(20), "cond": LINK("COND"), "cfg": FLOAT(8.0)},
            outputs=("LATENT",),
        )(_nothing),
        node("Edit", category="", inputs={"clip": LINK("CLIP"), "model": LINK("MODEL")}, outputs=("MODEL", "CLIP"))(
            _nothing
        ),
        node("Save", category="", inputs={"latent": LINK("LATENT")}, outputs=(), output_node=True)(_nothing),
        node("Picture", category="", inputs={"image": COMBO(files("input"), image_upload=True)}, outputs=("IMAGE",))(
            _nothing
        ),
    )
}


def _node(
    id: int | str, type: str, links: dict[str, Any] | None = None, values: Any = None, **more: Any
) -> dict[str, Any]:
    """A node as a page has it; `links` gives name → (type, number)."""
    inputs = [{"name": name, "type": kind, "link": link} for name, (kind, link) in (links or {}).items()]
    return {"id": id, "type": type, "mode": 0, "inputs": inputs, "widgets_values": values, **more}


def _page(*nodes: dict[str, Any], links: list[Any], **more: Any) -> dict[str, Any]:
    return {"nodes": list(nodes), "links": links, "version": 0.4, **more}


def _simple(*between: dict[str, Any], model: tuple[int, int] = (1, 0), links: tuple[Any, ...] = ()) -> dict[str, Any]:
    """Load → Sample → Save, with something between loader and sampler."""
    return _page(
        _node(1, "Load", values=["a.safetensors"]),
        *between,
        _node(5, "Sample", {"model": ("MODEL", 10)}, [7, "randomize", 4, 4.5]),
        _node(9, "Save", {"latent": ("LATENT", 11)}),
        links=[[10, *model, 5, 0, "MODEL"], [11, 5, 0, 9, 0, "LATENT"], *links],
    )


def _inputs(page: Any) -> dict[str, Any]:
    return {id: each["inputs"] for id, each in to_prompt(page, SPECS, LISTS).items()}


def test_the_recorded_page_becomes_the_prompt_that_it_sent():
    startup = json.loads(golden("comfyui/api/frontend_startup.json").read_text())
    requests = startup["frontends"]["1.37.11"]["requests"]
    (body,) = (each["body"] for each in requests if each["path"] == "/api/prompt")
    specs = {name: declared(entry) for name, entry in recorded_nodes().items()}

    prompt = to_prompt(body["extra_data"]["extra_pnginfo"]["workflow"], specs, LISTS)

    assert prompt == body["prompt"]


def test_values_follow_the_widgets_and_skip_the_control_of_seeds():
    assert _inputs(_simple()) == {
        "1": {"name": "a.safetensors"},
        "5": {"seed": 7, "steps": 4, "cfg": 4.5, "model": ["1", 0]},
        "9": {"latent": ["5", 0]},
    }


def test_values_without_a_control_after_the_seed_are_read():
    page = _simple()
    page["nodes"][1]["widgets_values"] = [7, 4, 4.5]

    assert _inputs(page)["5"] == {"seed": 7, "steps": 4, "cfg": 4.5, "model": ["1", 0]}


def test_values_by_name_are_read():
    page = _simple()
    page["nodes"][1]["widgets_values"] = {"cfg": 2.0, "seed": 3, "control_after_generate": "fixed"}

    assert _inputs(page)["5"] == {"seed": 3, "steps": 20, "cfg": 2.0, "model": ["1", 0]}


def test_links_may_be_objects():
    page = _simple()
    names = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    as_objects = {**page, "links": [dict(zip(names, link, strict=True)) for link in page["links"]], "version": 1}

    assert _inputs(as_objects) == _inputs(page)


def test_a_widget_turned_into_an_input_takes_its_link():
    page = _simple()
    sample = page["nodes"][1]
    sample["inputs"].append({"name": "steps", "type": "INT", "link": 12, "widget": {"name": "steps"}})
    sample["inputs"].append({"name": "cfg", "type": "FLOAT", "link": None, "widget": {"name": "cfg"}})
    page["nodes"].append(_node(6, "PrimitiveNode", values=[33, "fixed"]))
    page["links"].append([12, 6, 0, 5, 1, "INT"])

    inputs = _inputs(page)

    assert inputs["5"] == {"seed": 7, "steps": 33, "cfg": 4.5, "model": ["1", 0]}
    assert "6" not in inputs


def test_reroutes_and_notes_vanish():
    page = _simple(
        _node(2, "Reroute", {"": ("*", 20)}),
        _node(3, "Reroute", {"": ("*", 21)}),
        _node(4, "Note", values=["remember"]),
        model=(3, 0),
        links=([20, 1, 0, 2, 0, "*"], [21, 2, 0, 3, 0, "*"]),
    )

    inputs = _inputs(page)

    assert inputs["5"]["model"] == ["1", 0]
    assert inputs.keys() == {"1", "5", "9"}


def test_reroutes_in_a_circle_lead_nowhere():
    page = _simple(
        _node(2, "Reroute", {"": ("*", 21)}),
        _node(3, "Reroute", {"": ("*", 20)}),
        model=(3, 0),
        links=([20, 2, 0, 3, 0, "*"], [21, 3, 0, 2, 0, "*"]),
    )

    assert "model" not in _inputs(page)["5"]


def _edited(mode: int) -> dict[str, Any]:
    edit = _node(2, "Edit", {"clip": ("CLIP", 20), "model": ("MODEL", 21)}, mode=mode)
    return _simple(edit, model=(2, 0), links=([20, 1, 1, 2, 0, "CLIP"], [21, 1, 0, 2, 1, "MODEL"]))


def test_a_bypassed_node_hands_on_what_has_the_type_that_is_wanted():
    """Its first output is a model, its first input is none: the second is."""
    inputs = _inputs(_edited(mode=4))

    assert inputs["5"]["model"] == ["1", 0]
    assert "2" not in inputs
    assert _inputs(_edited(mode=0))["5"]["model"] == ["2", 0]


def test_what_a_muted_node_fed_is_missing():
    inputs = _inputs(_edited(mode=2))

    assert "model" not in inputs["5"]
    assert "2" not in inputs


def test_the_button_for_uploads_is_no_value():
    page = _page(_node(1, "Picture", values=["example.png", "image"]), links=[])

    assert _inputs(page) == {"1": {"image": "example.png"}}


def test_the_microphone_of_an_extension_is_no_value():
    page = _page(_node(1, "Text", values=["a fox", [False, True]]), links=[])

    assert _inputs(page) == {"1": {"text": "a fox"}}


def test_missing_values_take_their_defaults():
    page = _page(_node(1, "Sample", values=[3]), _node(2, "Load"), links=[])

    assert _inputs(page) == {"1": {"seed": 3, "steps": 20, "cfg": 8.0}, "2": {"name": "a.safetensors"}}


def test_values_too_many_are_refused():
    with pytest.raises(InvalidPrompt, match=r"node 1 \(Load\) has 1 values here; \['new'\] is left over"):
        _inputs(_page(_node(1, "Load", values=["a.safetensors", "new"]), links=[]))


def test_a_type_that_is_not_known_is_left_for_the_check_to_tell():
    page = _page(_node(1, "Magic", {"model": ("MODEL", 3)}, [1, 2]), _node(2, "Load"), links=[[3, 2, 0, 1, 0, "MODEL"]])

    prompt = to_prompt(page, SPECS, LISTS)

    assert prompt["1"] == {"inputs": {"model": ["2", 0]}, "class_type": "Magic", "_meta": {"title": "Magic"}}


def test_titles_are_kept():
    page = _page(_node(1, "Load", title="My model"), links=[])

    assert to_prompt(page, SPECS, LISTS)["1"]["_meta"] == {"title": "My model"}


# ── subgraphs ────────────────────────────────────────────────────────────────────────────────────────────────────────

BOX = "0b0c-uuid"


def _boxed(**instance: Any) -> dict[str, Any]:
    """Load → (subgraph: Edit → Sample) → Save; the sampler's seed and steps come from the subgraph's own inputs."""
    sample = _node(2, "Sample", {"model": ("MODEL", 31)}, [1, "fixed", 11, 1.5])
    sample["inputs"] += [
        {"name": "seed", "type": "INT", "link": 32, "widget": {"name": "seed"}},
        {"name": "steps", "type": "INT", "link": 33, "widget": {"name": "steps"}},
    ]
    definition = {
        "id": BOX,
        "name": "Box",
        "inputs": [
            {"name": "model", "type": "MODEL"},
            {"name": "seed", "type": "INT"},
            {"name": "steps", "type": "INT"},
        ],
        "outputs": [{"name": "LATENT", "type": "LATENT"}],
        "nodes": [_node(1, "Edit", {"clip": ("CLIP", None), "model": ("MODEL", 30)}), sample],
        "links": [
            {"id": 30, "origin_id": -10, "origin_slot": 0, "target_id": 1, "target_slot": 1, "type": "MODEL"},
            {"id": 31, "origin_id": 1, "origin_slot": 0, "target_id": 2, "target_slot": 0, "type": "MODEL"},
            {"id": 32, "origin_id": -10, "origin_slot": 1, "target_id": 2, "target_slot": 1, "type": "INT"},
            {"id": 33, "origin_id": -10, "origin_slot": 2, "target_id": 2, "target_slot": 2, "type": "INT"},
            {"id": 34, "origin_id": 2, "origin_slot": 0, "target_id": -20, "target_slot": 0, "type": "LATENT"},
        ],
    }
    node = _node(57, BOX, {"model": ("MODEL", 10)})
    node["inputs"] += [
        {"name": name, "type": "INT", "link": None, "widget": {"name": name}} for name in ("seed", "steps")
    ]
    return _page(
        _node(1, "Load", values=["a.safetensors"]),
        {**node, **instance},
        _node(9, "Save", {"latent": ("LATENT", 11)}),
        links=[[10, 1, 0, 57, 0, "MODEL"], [11, 57, 0, 9, 0, "LATENT"]],
        definitions={"subgraphs": [definition]},
    )


def test_a_subgraph_is_unfolded():
    assert _inputs(_boxed()) == {
        "1": {"name": "a.safetensors"},
        "57:1": {"model": ["1", 0]},
        "57:2": {"seed": 1, "steps": 11, "cfg": 1.5, "model": ["57:1", 0]},
        "9": {"latent": ["57:2", 0]},
    }


@pytest.mark.parametrize(
    ("instance", "expected"),
    [
        ({"widgets_values": [5, 6]}, {"seed": 5, "steps": 6, "cfg": 1.5}),
        ({"widgets_values": {"steps": 6}}, {"seed": 1, "steps": 6, "cfg": 1.5}),
        (
            {
                "widgets_values": [6, 3.5],
                "properties": {"proxyWidgets": [["-1", "steps"], ["2", "cfg"]]},
            },
            {"seed": 1, "steps": 6, "cfg": 3.5},
        ),
        # Names and values that do not match say nothing; what is inside holds.
        (
            {"widgets_values": [6], "properties": {"proxyWidgets": [["-1", "steps"], ["2", "cfg"]]}},
            {"seed": 1, "steps": 11, "cfg": 1.5},
        ),
    ],
)
def test_values_shown_on_a_subgraph_reach_the_nodes_inside(instance, expected):
    inputs = _inputs(_boxed(**instance))["57:2"]

    assert {name: inputs[name] for name in expected} == expected


def test_a_bypassed_or_muted_subgraph_is_empty():
    assert _inputs(_boxed(mode=2)).keys() == {"1", "9"}
    assert _inputs(_boxed(mode=4)).keys() == {"1", "9"}


def test_a_subgraph_within_itself_is_refused():
    page = _boxed()
    page["definitions"]["subgraphs"][0]["nodes"].append(_node(3, BOX))

    with pytest.raises(InvalidPrompt, match="lies in more than"):
        _inputs(page)


def test_subgraphs_that_unfold_without_end_are_refused():
    """Ten levels, each with ten of the next: a short file and more nodes than there is memory."""
    levels = [
        {"id": f"s{level}", "name": "s", "nodes": [_node(k, f"s{level + 1}") for k in range(10)], "links": []}
        for level in range(10)
    ]
    last = {"id": "s10", "name": "s", "nodes": [_node(1, "Load")], "links": []}
    page = _page(_node(1, "s0"), links=[], definitions={"subgraphs": [*levels, last]})

    with pytest.raises(InvalidPrompt, match="more than 10000 nodes"):
        _inputs(page)


def test_group_nodes_are_refused_by_name():
    with pytest.raises(InvalidPrompt, match="workflow>My group"):
        _inputs(_page(_node(1, "workflow>My group"), links=[]))


def test_choices_of_a_text_are_made():
    page = _page(_node(1, "Text", values=["a {red} fox"]), links=[])

    assert _inputs(page)["1"]["text"] == "a red fox"


# ── whatever else JSON may hold ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "page",
    [
        None,
        [],
        {},
        {"nodes": None},
        {"nodes": ["x"]},
        {"nodes": [{"id": 1}]},
        {"nodes": [{"id": True, "type": "Load"}]},
        {"nodes": [_node(1, "Load", values="a")]},
        {"nodes": [{"id": 1, "type": "Load", "inputs": [{"link": 3}]}]},
        {"nodes": [], "links": 5},
        {"nodes": [], "links": [[1, 2]]},
        {"nodes": [], "links": [[1, 2, "x", 4, 5]]},
        {"nodes": [], "definitions": {"subgraphs": [{"name": "x"}]}},
    ],
)
def test_a_damaged_page_is_refused_with_a_reason(page):
    with pytest.raises(InvalidPrompt, match="no workflow that the web page could have saved"):
        to_prompt(page, SPECS, LISTS)


KEYS = st.sampled_from(
    ["nodes", "links", "id", "type", "mode", "inputs", "widgets_values", "name", "link", "widget", "definitions",
     "subgraphs", "properties", "proxyWidgets", "origin_id", "origin_slot", "target_id", "target_slot"]
)  # fmt: skip


@st.composite
def _disturbed(draw):
    """A sound page with some of its parts replaced by anything."""
    page = copy.deepcopy(draw(st.sampled_from([_boxed(), _edited(4), _simple()])))
    for _ in range(draw(st.integers(1, 3))):
        place: Any = page
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(place[key], dict | list) and draw(st.booleans()):
                place = place[key]
                continue
            place[key] = draw(JSON | st.integers(-20, 60) | st.sampled_from(["-10", BOX, "Reroute", "PrimitiveNode"]))
            break
    return page


@settings(max_examples=200, deadline=None)
@given(page=_disturbed() | st.dictionaries(KEYS, JSON | st.lists(st.dictionaries(KEYS, JSON), max_size=3)))
def test_nothing_that_json_can_hold_is_more_than_a_refusal(page):
    try:
        prompt = to_prompt(page, SPECS, LISTS)
    except InvalidPrompt:
        return
    assert is_frontend_format(page)
    assert json.dumps(prompt)
