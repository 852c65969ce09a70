"""Nodes that hold or show values, and those that only the web page knows."""

from typing import Any

import pytest
import torch

from octavo.graph.nodes import NODES, primitives
from octavo.graph.workflow import validate
from tests.graph.compare import FixedLists
from tests.graph.nodes.bare import bare, gradient
from tests.graph.nodes.runs import run, use

VALUES = {
    "PrimitiveInt": -(2**63) + 1,
    "PrimitiveFloat": 0.25,
    "PrimitiveBoolean": True,
    "PrimitiveString": "a",
    "PrimitiveStringMultiline": "a\nb",
}


@pytest.mark.parametrize(("name", "value"), list(VALUES.items()))
def test_primitives_hand_on_their_value(name: str, value: Any) -> None:
    assert NODES[name].run(bare(), value=value) == (value,)
    assert NODES[name].output_types == (NODES[name].inputs["value"].type,)


def test_texts_are_joined_by_the_delimiter() -> None:
    (text,) = primitives.string_concatenate.run(bare(), string_a="a", string_b="b", delimiter=", ")
    assert text == "a, b"


@pytest.mark.parametrize(
    ("value", "text"),
    [("a\nb", "a\nb"), (3, "3"), (2.5, "2.5"), (True, "True"), (None, "None"), ([1, {"a": None}], '[1, {"a": null}]')],
)
def test_plain_values_are_shown_as_text(value: object, text: str) -> None:
    assert primitives.preview_any.run(bare(), source=value).ui == {"text": (text,)}


def test_other_values_are_shown_as_python_shows_them() -> None:
    loop: list[object] = []
    loop.append(loop)
    for value in (torch.ones(2), loop, gradient):
        assert primitives.preview_any.run(bare(), source=value).ui == {"text": (str(value),)}


def test_a_prompt_may_hold_nodes_of_the_web_page() -> None:
    prompt = {
        "1": use("PrimitiveNode", value=24),
        "2": use("Reroute", **{"": ["1", 0]}),
        "3": use("EmptyImage", width=["2", 0], height=16, batch_size=1, color=255),
        "4": use("Reroute", **{"": ["3", 0]}),
        "5": use("Keep", value=["4", 0]),
        "6": use("Note", text="mind the gap"),
        "7": use("MarkdownNote", **{"": "**mind**"}),
    }
    out = run(prompt, bare_with_names())
    assert out["5"].shape == (1, 16, 24, 3)


def bare_with_names() -> Any:
    context = bare()
    context.shelf.names = lambda _category: []  # type: ignore[method-assign]
    return context


def test_a_note_alone_is_nothing_to_run() -> None:
    prompt = {"1": use("Note", text="mind the gap"), "2": use("PreviewAny", source=5)}
    workflow = validate(prompt, NODES, FixedLists())
    assert workflow.outputs == ("2",)
