"""Compares declared nodes with the recorded `/object_info` of ComfyUI.

Everything that a program reads must be equal: keys, the order of inputs, types, defaults, ranges, choices, outputs,
names, categories. Free are the words for people (`description`, `tooltip`, `output_tooltips`, `search_aliases`), which
are ours, and the names in lists of files.
"""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from octavo.graph.spec import Input, NodeSpec
from tests.goldens import golden

PROSE = ("description", "output_tooltips", "search_aliases")


class FixedLists:
    """Lists with the names given, and folders that need not exist."""

    def __init__(self, folder: Path = Path("/nowhere"), **names: Sequence[str]) -> None:
        self.input_dir, self.output_dir, self.temp_dir = folder / "input", folder / "output", folder / "temp"
        self._names = names

    def names(self, category: str) -> Sequence[str]:
        return self._names.get(category, ())


@cache
def recorded_nodes() -> dict[str, Any]:
    """The recorded entries by name."""
    nodes: dict[str, Any] = json.loads(golden("comfyui/object_info.json").read_text())["nodes"]
    return nodes


def declared(entry: dict[str, Any]) -> NodeSpec:
    """What an author would write for a recorded entry, with a function that gives nothing."""
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


def differences(spec: NodeSpec) -> list[str]:
    """Where `spec` is not what ComfyUI declares; none is wanted.

    Every difference reads "field: ours, theirs".
    """
    theirs = recorded_nodes()[spec.name]
    ours = json.loads(json.dumps(spec.object_info(FixedLists(vae=["pixel_space"]))))
    found = [] if list(ours) == list(theirs) else _different("keys", list(ours), list(theirs))
    for key in set(ours) & set(theirs) - {"input"} - set(PROSE):
        found += _different(key, ours[key], theirs[key])
    for section in {*ours["input"], *theirs["input"]}:
        mine, others = ours["input"].get(section, {}), theirs["input"].get(section, {})
        for name in {*mine, *others}:
            of_files = name in spec.inputs and callable(spec.inputs[name].choices)
            found += _different(
                f"{section} {name}", _essence(mine.get(name), of_files), _essence(others.get(name), of_files)
            )
    return found


def _essence(declared: Any, of_files: bool) -> Any:
    """An input without its words for people, and without its files if it lists some."""
    if not isinstance(declared, list):
        return declared
    kind, options = declared[0], dict(declared[1]) if len(declared) > 1 else None
    if options is not None:
        options.pop("tooltip", None)
    if of_files:
        kind = [] if isinstance(kind, list) else kind
        if options is not None and "options" in options:
            options["options"] = []
    # An input whose only option was a tooltip says the same as one without options.
    return [kind, options or {}]


def _different(what: str, ours: Any, theirs: Any) -> list[str]:
    # 1 == 1.0 in Python, but a program that reads JSON may care which it is.
    return (
        [] if json.dumps(ours, sort_keys=True) == json.dumps(theirs, sort_keys=True) else [f"{what}: {ours}, {theirs}"]
    )
