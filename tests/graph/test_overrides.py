"""Values of a workflow are changed from outside by node and input."""

import copy

import pytest

from octavo.errors import RequestError
from octavo.graph.overrides import override, with_seed
from octavo.graph.spec import INT, LINK, node
from tests.graph.toys import IMAGE_PROMPT, TOYS

SAMPLE = node("Sample", category="", inputs={"noise_seed": INT(0), "image": LINK("IMAGE")}, outputs=())(lambda _: ())
SPECS = {**TOYS, "Sample": SAMPLE}
PROMPT = {
    **IMAGE_PROMPT,
    "57:3": {"class_type": "Show", "inputs": {"text": "x"}, "_meta": {"title": "Say it"}},
    "4": {"class_type": "Sample", "inputs": {"noise_seed": 1, "image": ["1", 0]}},
    "5": {"class_type": "Sample", "inputs": {"noise_seed": ["9", 0]}},
}


@pytest.mark.parametrize(
    ("change", "id", "name", "value"),
    [
        ("1.width=128", "1", "width", 128),
        ("1.inputs.width=128", "1", "width", 128),
        ("EmptyImage.width=128", "1", "width", 128),
        ("57:3.text=a red = fox", "57:3", "text", "a red = fox"),
        ("Say it.text=hello", "57:3", "text", "hello"),
        ("Show.text=42", "57:3", "text", "42"),
        ("Show.text=[1]", "57:3", "text", "[1]"),
        ("Show.loud=true", "57:3", "loud", True),
        ('Show.text=["1", 0]', "57:3", "text", ["1", 0]),
        ("2.prefix=", "2", "prefix", ""),
        ("1.width=wide", "1", "width", "wide"),
    ],
)
def test_one_value_is_changed_and_all_else_kept(change, id, name, value):
    before = copy.deepcopy(PROMPT)

    changed = override(PROMPT, [change], SPECS)

    assert changed[id]["inputs"][name] == value
    changed[id]["inputs"][name] = before[id]["inputs"].get(name)
    assert {**changed[id]["inputs"], **before[id]["inputs"]} == changed[id]["inputs"]
    assert {key: each for key, each in changed.items() if key != id} == {k: v for k, v in before.items() if k != id}
    assert before == PROMPT


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("width", "write NODE.INPUT=VALUE"),
        ("1=5", "write NODE.INPUT=VALUE"),
        (".width=5", "write NODE.INPUT=VALUE"),
        ("8.width=5", r"no node '8'.*1 \(EmptyImage\)"),
        ("EmptyImge.width=5", "Did you mean 'EmptyImage'"),
        ("1.widht=5", "Did you mean 'width'"),
        ("Sample.noise_seed=5", "any of the nodes 4, 5"),
    ],
)
def test_a_change_that_cannot_be_made_is_refused(change, reason):
    with pytest.raises(RequestError, match=reason):
        override(PROMPT, [change], SPECS)


def test_a_seed_changes_every_one_that_is_typed_in():
    changed = with_seed(PROMPT, 77, SPECS)

    assert changed["4"]["inputs"]["noise_seed"] == 77
    assert changed["5"]["inputs"]["noise_seed"] == ["9", 0]
    assert PROMPT["4"]["inputs"]["noise_seed"] == 1


def test_a_seed_for_a_workflow_without_one_is_refused():
    with pytest.raises(RequestError, match="no node of the workflow has a seed"):
        with_seed(IMAGE_PROMPT, 77, SPECS)
