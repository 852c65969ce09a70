"""Values of a workflow changed from outside: `6.inputs.text=a fox`, or `6.text=a fox`."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from octavo.errors import RequestError, did_you_mean
from octavo.graph.spec import Input, NodeSpec

SEEDS = ("seed", "noise_seed")


def override(prompt: Mapping[str, Any], changes: Sequence[str], specs: Mapping[str, NodeSpec]) -> dict[str, Any]:
    """A prompt with some of its values changed; the one given stays as it is.

    Args:
        prompt: in the API format.
        changes: `node.input=value`. The node is an id, a title, or a class of which there is only one. The value is
            text for a text input; JSON otherwise, where it is any: `["4", 0]` is a link.

    Raises:
        RequestError: a change that is not of this form, or no such node or input.
    """
    changed: dict[str, Any] = {id: _copied(given) for id, given in prompt.items()}
    for change in changes:
        place, equals, text = change.partition("=")
        node, dot, name = place.rpartition(".")
        node = node.removesuffix(".inputs")
        if not equals or not dot or not node or not name:
            raise RequestError(f"--set {change}: write NODE.INPUT=VALUE, such as 6.text='a fox'.")
        id = _node(changed, node.strip(), change)
        wanted = _input(changed[id], name.strip(), specs, change)
        changed[id]["inputs"][name.strip()] = _value(text, wanted)
    return changed


def with_seed(prompt: Mapping[str, Any], seed: int, specs: Mapping[str, NodeSpec]) -> dict[str, Any]:
    """A prompt with every seed that is typed into a node changed.

    Raises:
        RequestError: there is no seed to change.
    """
    changed: dict[str, Any] = {id: _copied(given) for id, given in prompt.items()}
    found = False
    for given in changed.values():
        spec = specs.get(given["class_type"]) if isinstance(given.get("class_type"), str) else None
        for name in SEEDS:
            if spec is not None and name in spec.inputs and not isinstance(given["inputs"].get(name), list):
                given["inputs"][name] = seed
                found = True
    if not found:
        raise RequestError("--seed: no node of the workflow has a seed.")
    return changed


def _copied(given: Any) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        return {"inputs": {}}
    inputs = given.get("inputs")
    return {**given, "inputs": dict(inputs) if isinstance(inputs, Mapping) else {}}


def _node(prompt: Mapping[str, Any], name: str, change: str) -> str:
    """The id of the node meant by `name`: an id, a title or a class."""
    if name in prompt:
        return name
    titles = {id: _title(given) for id, given in prompt.items()}
    classes = {id: str(given.get("class_type")) for id, given in prompt.items()}
    for names in (titles, classes):
        meant = [id for id, each in names.items() if each == name]
        if len(meant) == 1:
            return meant[0]
        if meant:
            raise RequestError(f"--set {change}: '{name}' may be any of the nodes {', '.join(meant)}; give the id.")
    known = [f"{id} ({titles[id] or classes[id]})" for id in prompt]
    hint = did_you_mean(name, [*prompt, *filter(None, titles.values()), *classes.values()])
    raise RequestError(f"--set {change}: there is no node '{name}'.{hint} There are: {', '.join(known) or 'none'}.")


def _title(given: Mapping[str, Any]) -> str:
    meta = given.get("_meta")
    title = meta.get("title") if isinstance(meta, Mapping) else None
    return title if isinstance(title, str) else ""


def _input(given: Mapping[str, Any], name: str, specs: Mapping[str, NodeSpec], change: str) -> Input | None:
    """The declaration of the input to change; None where the class of the node is not known."""
    spec = specs.get(str(given.get("class_type")))
    if spec is None:
        return None
    inputs = [each for each, wanted in spec.inputs.items() if wanted.section != "hidden"]
    if name not in inputs:
        hint = did_you_mean(name, inputs) or f" It has: {', '.join(inputs) or 'none'}."
        raise RequestError(f"--set {change}: {spec.name} has no input '{name}'.{hint}")
    return spec.inputs[name]


def _value(text: str, wanted: Input | None) -> Any:
    """The value meant by `text`."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    is_link = isinstance(value, list) and len(value) == 2 and isinstance(value[1], int)
    # A text such as 42 or true is a text where one is wanted; a link is a link everywhere.
    is_text = wanted is not None and wanted.type in ("STRING", "COMBO")
    return text if is_text and not is_link else value
