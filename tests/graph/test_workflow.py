"""Prompts are checked as ComfyUI checks them, and nothing that JSON can hold is more than a refusal."""

import copy
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.graph.spec import INT, NodeSpec, node
from octavo.graph.workflow import InvalidPrompt, Link, validate
from tests.goldens import golden
from tests.graph.compare import FixedLists, declared, recorded_nodes
from tests.graph.toys import IMAGE_PROMPT, TOYS

SEED = INT(0, min=0, max=100, control_after_generate=True)
LISTS = FixedLists(checkpoints=["tiny.safetensors"], input=["example.png"])


def recorded_specs() -> dict[str, NodeSpec]:
    """Nodes declared as ComfyUI's, LoadImage with its own test of the file."""
    specs = {name: declared(entry) for name, entry in recorded_nodes().items()}
    image = specs["LoadImage"].inputs["image"]
    checked = replace(image, check=lambda value, _lists: f"Invalid image file: {value}")
    return {**specs, "LoadImage": replace(specs["LoadImage"], inputs={"image": checked})}


def _answer(prompt: Any, specs: Mapping[str, NodeSpec], targets: Any = None) -> tuple[int, dict[str, Any]]:
    try:
        workflow = validate(prompt, specs, LISTS, targets=targets)
    except InvalidPrompt as refused:
        return 400, {"error": refused.error, "node_errors": refused.node_errors}
    return 200, {"node_errors": dict(workflow.node_errors)}


def _comparable(answer: dict[str, Any]) -> dict[str, Any]:
    """An answer without what varies: ids, and the texts of exceptions, of which ours say more."""
    answer = copy.deepcopy(answer)
    for key in ("prompt_id", "number"):
        answer.pop(key, None)
    for faults in answer["node_errors"].values():
        for each in faults["errors"]:
            if each["type"].startswith("exception"):
                assert isinstance(each["details"], str)
                assert isinstance(each["extra_info"]["exception_message"], str)
                assert isinstance(each["extra_info"]["traceback"], list)
                each["details"] = each["extra_info"]["exception_message"] = each["extra_info"]["traceback"] = ""
        # Theirs come in the order of a set.
        faults["errors"].sort(key=lambda each: each["details"])
    return answer


def test_every_recorded_prompt_is_answered_as_comfyui_answers():
    """Left out are bodies that are no prompt (the server's business); of a circle ours says where it runs."""
    exchanges = json.loads(golden("comfyui/api/prompt_validation.json").read_text())["exchanges"]
    specs = recorded_specs()
    compared = 0
    for exchange in exchanges:
        body = exchange["request"].get("json")
        if exchange["request"]["path"] != "/prompt" or not body or "prompt" not in body:
            continue
        status, answer = _answer(body["prompt"], specs, body.get("partial_execution_targets"))
        if exchange["name"] == "cycle":
            assert answer["error"].pop("details") == "the links run in a circle: 1 ← 2 ← 1"
            exchange["response"]["json"]["error"].pop("details")

        assert status == exchange["response"]["status"], exchange["name"]
        assert _comparable(answer) == _comparable(
            {"node_errors": {}, **exchange["response"]["json"]} if status == 200 else exchange["response"]["json"]
        ), exchange["name"]
        compared += 1
    assert compared == 23


def test_values_are_converted_as_comfyui_converts_them():
    prompt = copy.deepcopy(IMAGE_PROMPT)
    prompt["1"]["inputs"] = {"width": "64", "height": 48.9, "batch_size": True, "color": "255"}

    workflow = validate(prompt, TOYS, LISTS)

    assert workflow.nodes["1"].inputs == {"width": 64, "height": 48, "batch_size": 1, "color": 255}
    assert workflow.nodes["2"].inputs["images"] == Link("1", 0)
    assert workflow.outputs == ("2",)
    assert prompt["1"]["inputs"]["width"] == "64"


@pytest.mark.parametrize(
    ("value", "kept"), [(True, True), (0, False), ("true", True), ("false", False), ("No", False), (1.0, True)]
)
def test_yes_and_no_are_read_as_they_are_meant(value, kept):
    workflow = validate({"1": {"class_type": "Show", "inputs": {"text": "x", "loud": value}}}, TOYS, LISTS)

    assert workflow.nodes["1"].inputs["loud"] is kept


@pytest.mark.parametrize(
    ("value", "type"),
    [
        ("abc", "invalid_input_type"),
        (None, "invalid_input_type"),
        ({"a": 1}, "invalid_input_type"),
        (float("inf"), "invalid_input_type"),
        (float("nan"), "invalid_input_type"),
        ([], "bad_linked_input"),
        (["1"], "bad_linked_input"),
        (["1", 0, 0], "bad_linked_input"),
        ({"__value__": [1, 2]}, "invalid_input_type"),
        (["nowhere", 0], "exception_during_inner_validation"),
        ([["1"], 0], "exception_during_inner_validation"),
        (["2", -1], "exception_during_inner_validation"),
        (["2", "0"], "exception_during_inner_validation"),
        (["2", True], "exception_during_inner_validation"),
        (-1, "value_smaller_than_min"),
        (10**30, "value_bigger_than_max"),
    ],
)
def test_a_value_that_will_not_do_is_named(value, type):
    prompt = copy.deepcopy(IMAGE_PROMPT)
    prompt["1"]["inputs"]["width"] = value

    status, answer = _answer(prompt, TOYS)

    assert status == 400
    assert [each["type"] for each in answer["node_errors"]["1"]["errors"]] == [type]
    assert answer["node_errors"]["1"]["dependent_outputs"] == ["2"]


def test_a_broken_link_of_an_output_node_is_named_there():
    prompt = copy.deepcopy(IMAGE_PROMPT)
    prompt["2"]["inputs"]["images"] = ["7", 0]

    _, answer = _answer(prompt, TOYS)

    (error,) = answer["node_errors"]["2"]["errors"]
    assert error["type"] == "exception_during_validation"
    assert "there is no node '7'" in error["details"]


def test_an_input_that_the_node_does_not_have_is_refused():
    prompt = copy.deepcopy(IMAGE_PROMPT)
    prompt["1"]["inputs"]["widht"] = 64

    _, answer = _answer(prompt, TOYS)

    (error,) = answer["node_errors"]["1"]["errors"]
    assert (error["type"], error["extra_info"]["input_name"]) == ("unknown_input", "widht")
    assert "Did you mean 'width'?" in error["details"]


def test_what_web_pages_add_to_nodes_is_tolerated():
    prompt = {
        "1": {"class_type": "LoadToy", "inputs": {"image": "example.png", "upload": "image"}, "is_changed": ["ab12"]},
        "2": {**IMAGE_PROMPT["2"], "_meta": {"title": "Keep"}},
        "3": {"class_type": "Show", "inputs": {"text": "x", "speak_and_recognation": {"__value__": [False, True]}}},
        "4": {"class_type": "Seeded", "inputs": {"seed": 5, "control_after_generate": "randomize"}},
    }
    seeded = node("Seeded", category="", inputs={"seed": SEED}, outputs=(), output_node=True)(lambda _: ())

    workflow = validate(prompt, {**TOYS, "Seeded": seeded}, LISTS)

    assert dict(workflow.nodes["1"].inputs) == {"image": "example.png"}
    assert dict(workflow.nodes["4"].inputs) == {"seed": 5}
    assert workflow.nodes["2"].title == "Keep"


@pytest.mark.parametrize("name", ["upload", "control_after_generate"])
def test_it_is_tolerated_only_where_pages_add_it(name):
    prompt = {"3": {"class_type": "Show", "inputs": {"text": "x", name: "image"}}}

    _, answer = _answer(prompt, TOYS)

    assert answer["node_errors"]["3"]["errors"][0]["type"] == "unknown_input"


def test_an_input_added_later_takes_its_default_and_an_old_one_is_missed():
    """A node that gains an input with a default must not break the prompts of yesterday."""
    workflow = validate({"1": {"class_type": "Show", "inputs": {"text": "x"}}}, TOYS, LISTS)
    status, answer = _answer({"1": {"class_type": "Show", "inputs": {}}}, TOYS)

    assert dict(workflow.nodes["1"].inputs) == {"text": "x", "loud": False}
    assert status == 400
    assert answer["node_errors"]["1"]["errors"][0]["extra_info"] == {"input_name": "text"}


def test_ids_of_links_may_be_written_as_numbers():
    prompt = copy.deepcopy(IMAGE_PROMPT)
    prompt["2"]["inputs"]["images"] = [1, 0]

    assert validate(prompt, TOYS, LISTS).nodes["2"].inputs["images"] == Link("1", 0)


def test_only_what_the_outputs_need_is_checked_and_kept():
    prompt = {**IMAGE_PROMPT, "9": {"class_type": "EmptyImage", "inputs": {"width": "no number"}}}

    assert list(validate(prompt, TOYS, LISTS).nodes) == ["1", "2"]


def test_a_circle_spares_the_other_outputs():
    circle = {
        "5": {"class_type": "Invert", "inputs": {"image": ["6", 0]}},
        "6": {"class_type": "Invert", "inputs": {"image": ["5", 0]}},
        "7": {"class_type": "SaveToy", "inputs": {"images": ["5", 0], "prefix": "x"}},
    }

    workflow = validate({**IMAGE_PROMPT, **circle}, TOYS, LISTS)

    assert workflow.outputs == ("2",)
    assert "5 ← 6 ← 5" in workflow.node_errors["7"]["errors"][0]["details"]


def test_a_node_that_feeds_itself_is_a_circle():
    prompt = {
        "5": {"class_type": "Invert", "inputs": {"image": ["5", 0]}},
        "7": {"class_type": "SaveToy", "inputs": {"images": ["5", 0], "prefix": "x"}},
    }

    with pytest.raises(InvalidPrompt, match="5 ← 5"):
        validate(prompt, TOYS, LISTS)


def test_a_very_long_chain_is_no_trouble():
    """Longer than Python's stack is deep."""
    prompt: dict[str, Any] = dict(IMAGE_PROMPT)
    for number in range(5000):
        source = "1" if number == 0 else f"n{number - 1}"
        prompt[f"n{number}"] = {"class_type": "Invert", "inputs": {"image": [source, 0]}}
    prompt["2"] = {"class_type": "SaveToy", "inputs": {"images": ["n4999", 0], "prefix": "x"}}

    assert len(validate(prompt, TOYS, LISTS).nodes) == 5002


@pytest.mark.parametrize("prompt", [None, 3, "x", True, ["x"], [[]], {"1": None}, {"1": []}, {"1": {"class_type": []}}])
def test_what_is_no_prompt_is_refused_with_a_reason(prompt):
    with pytest.raises(InvalidPrompt) as refused:
        validate(prompt, TOYS, LISTS)

    assert refused.value.error["message"]
    assert json.dumps(refused.value.error)


def test_deep_nesting_is_refused():
    deep: Any = []
    for _ in range(800):
        deep = [deep]
    prompt = copy.deepcopy(IMAGE_PROMPT)
    prompt["1"]["inputs"]["width"] = deep

    with pytest.raises(InvalidPrompt, match="nested too deeply"):
        validate(prompt, TOYS, LISTS)


def test_half_characters_are_refused():
    """They cannot be written as UTF-8, neither into an answer nor into a picture."""
    prompt = copy.deepcopy(IMAGE_PROMPT)
    prompt["2"]["inputs"]["prefix"] = "a\ud800"

    with pytest.raises(InvalidPrompt, match="no Unicode"):
        validate(prompt, TOYS, LISTS)


@pytest.mark.parametrize("targets", [["9"], [], ["1"]])
def test_targets_that_are_no_outputs_are_named(targets):
    with pytest.raises(InvalidPrompt, match="there are: 2"):
        validate(IMAGE_PROMPT, TOYS, LISTS, targets=targets)


def test_the_text_of_a_refusal_names_every_fault():
    prompt = copy.deepcopy(IMAGE_PROMPT)
    prompt["1"]["inputs"]["width"] = "wide"
    del prompt["2"]["inputs"]["prefix"]

    with pytest.raises(InvalidPrompt) as refused:
        validate(prompt, TOYS, LISTS)

    assert "node 1 (EmptyImage)" in str(refused.value)
    assert "node 2 (SaveToy): Required input is missing: prefix" in str(refused.value)


WORDS = st.sampled_from(
    ["1", "2", "class_type", "inputs", "EmptyImage", "SaveToy", "Invert", "images", "image", "width", "_meta", "title"]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=5) | WORDS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(WORDS | st.text(st.characters(), max_size=3), inner, max_size=4)
    ),
    max_leaves=20,
)
NODE = st.fixed_dictionaries(
    {}, optional={"class_type": WORDS | JSON, "inputs": st.dictionaries(WORDS, JSON), "_meta": JSON}
)


@settings(max_examples=300, deadline=None)
@given(prompt=JSON | st.dictionaries(WORDS, NODE, max_size=4) | st.lists(NODE, max_size=3), targets=st.none() | JSON)
def test_nothing_that_json_can_hold_is_more_than_a_refusal(prompt, targets):
    status, answer = _answer(prompt, TOYS, targets)

    assert json.dumps(answer, allow_nan=False, ensure_ascii=False).encode()
    assert status == 200 or answer["error"]["type"]


def test_many_unknown_inputs_are_not_all_told():
    """To look for what each could have meant would take minutes."""
    prompt = copy.deepcopy(IMAGE_PROMPT)
    prompt["1"]["inputs"] |= {f"width{number}": 1 for number in range(100_000)}

    _, answer = _answer(prompt, TOYS)

    assert len(answer["node_errors"]["1"]["errors"]) == 20
