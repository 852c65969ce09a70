"""Nodes that only hold or show a value, and those that exist on the web page alone."""

import json
from typing import Any

from octavo.graph.context import Context
from octavo.graph.spec import BOOLEAN, FLOAT, INT, LINK, STRING, Input, NodeResult, NodeSpec, node

LARGEST = 2**63 - 1


def _value(_context: Context, value: Any) -> tuple[Any]:
    return (value,)


def _primitive(name: str, title: str, value: Input, what: str) -> NodeSpec:
    """A node that holds one value, to be given to several inputs."""
    return node(
        name,
        display_name=title,
        category="utils/primitive",
        module="comfy_extras.nodes_primitive",
        description=f"{what} for several inputs.",
        inputs={"value": value},
        outputs=(value.type,),
    )(_value)


primitive_int = _primitive(
    "PrimitiveInt", "Int", INT(min=-LARGEST, max=LARGEST, control_after_generate=True), "A whole number"
)
primitive_float = _primitive("PrimitiveFloat", "Float", FLOAT(min=-LARGEST, max=LARGEST), "A number")
primitive_boolean = _primitive("PrimitiveBoolean", "Boolean", BOOLEAN(), "Yes or no")
primitive_string = _primitive("PrimitiveString", "String", STRING(multiline=False), "A line of text")
primitive_string_multiline = _primitive(
    "PrimitiveStringMultiline", "String (Multiline)", STRING(multiline=True), "A text"
)


@node(
    "StringConcatenate",
    display_name="Concatenate",
    category="utils/string",
    module="comfy_extras.nodes_string",
    description="Two texts in a row.",
    inputs={
        "string_a": STRING(multiline=True),
        "string_b": STRING(multiline=True),
        "delimiter": STRING("", multiline=False),
    },
    outputs=("STRING",),
    search_aliases=("join text", "combine strings"),
)
def string_concatenate(_context: Context, string_a: str, string_b: str, delimiter: str) -> tuple[str]:
    return (delimiter.join((string_a, string_b)),)


@node(
    "PreviewAny",
    display_name="Preview as Text",
    category="utils",
    module="comfy_extras.nodes_preview_any",
    classic=True,
    description="Shows whatever it is given, as text.",
    inputs={"source": LINK("*")},
    outputs=(),
    output_node=True,
    search_aliases=("show text", "inspect"),
)
def preview_any(_context: Context, source: Any) -> NodeResult:
    return NodeResult(ui={"text": (_as_text(source),)})


def _as_text(value: Any) -> str:
    """Texts as they are, plain values as JSON, everything else as Python shows it."""
    if isinstance(value, str):
        return value
    if value is None or isinstance(value, bool | int | float):
        return str(value)
    try:
        return json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        return str(value)


# The web page's own. Its exports leave them out, but prompts written by other programs may not.


@node(
    "Reroute",
    category="utils",
    description="Hands on what it gets.",
    inputs={"": LINK("*")},
    outputs=("*",),
    listed=False,
)
def reroute(_context: Context, **inputs: Any) -> tuple[Any]:
    return (inputs[""],)


primitive_node = node(
    "PrimitiveNode",
    category="utils",
    description="A value for several inputs.",
    inputs={"value": LINK("*")},
    outputs=("*",),
    listed=False,
)(_value)


def _says_nothing(_context: Context, **_inputs: Any) -> tuple[()]:
    return ()


note, markdown_note = (
    node(
        name,
        category="utils",
        description="A text for the reader of a workflow.",
        inputs={"": STRING(multiline=True).optional, "text": STRING(multiline=True).optional},
        outputs=(),
        listed=False,
    )(_says_nothing)
    for name in ("Note", "MarkdownNote")
)

NODES: tuple[NodeSpec, ...] = (
    primitive_int,
    primitive_float,
    primitive_boolean,
    primitive_string,
    primitive_string_multiline,
    string_concatenate,
    preview_any,
    reroute,
    primitive_node,
    note,
    markdown_note,
)
