"""Completes a piece of a workflow: nodes without ids, without links, or without an end that saves a picture.

Articles about SD3.5 in FP8 pass on such a piece: loader, text, empty latents and sampler as bare objects one after the
other. It cannot be run as it is, since nothing says what feeds what; but it can be shown how it would be whole.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from octavo.graph.spec import NodeSpec

Nodes = dict[str, dict[str, Any]]

MOST_NODES = 100  # of a piece; a larger one is no slip of a pen


def looks_like_nodes(given: Any) -> bool:
    """Whether `given` is a list of node objects, as JSON has them."""
    return (
        isinstance(given, list)
        and bool(given)
        and all(isinstance(each, dict) and isinstance(each.get("class_type"), str) for each in given)
    )


def complete(given: Sequence[Mapping[str, Any]], specs: Mapping[str, NodeSpec]) -> Nodes | None:
    """The whole workflow that `given` is probably meant to be.

    Ids are kept where every node has one ("id"), links where they lead to a node by its id or class. Missing links
    come from the nearest node before that gives the type; what is left over at the end is decoded and saved.

    Returns:
        A prompt in the API format, or None if something that cannot be guessed is missing.
    """
    if len(given) > MOST_NODES or not all(each["class_type"] in specs for each in given):
        return None
    if any(name not in specs for name in ("CLIPTextEncode", "VAEDecode", "SaveImage")):
        return None
    return _Completion(given, specs).nodes()


def as_json(nodes: Nodes) -> str:
    """The workflow as text to save, one node a line."""
    lines = [f"  {json.dumps(id)}: {json.dumps(each, ensure_ascii=False)}" for id, each in nodes.items()]
    return "{\n" + ",\n".join(lines) + "\n}"


class _Completion:
    def __init__(self, given: Sequence[Mapping[str, Any]], specs: Mapping[str, NodeSpec]) -> None:
        self.specs = specs
        self.result: Nodes = {}
        ids = [str(each["id"]) for each in given if isinstance(each.get("id"), str | int)]
        if len(set(ids)) < len(given):
            ids = [str(number) for number in range(1, len(given) + 1)]
        for id, each in zip(ids, given, strict=True):
            inputs = each.get("inputs")
            node = {"class_type": each["class_type"], "inputs": dict(inputs) if isinstance(inputs, Mapping) else {}}
            self.result[id] = {**node, **({"_meta": each["_meta"]} if isinstance(each.get("_meta"), Mapping) else {})}
        self.kept = len(set(ids)) == len(given) and any("id" in each for each in given)

    def nodes(self) -> Nodes | None:
        """Everything linked and ended; None where a link has no source."""
        for id in list(self.result):
            spec = self._spec(id)
            inputs = self.result[id]["inputs"]
            for name, wanted in spec.inputs.items():
                if wanted.section != "required" or (wanted.is_widget and name in inputs):
                    continue
                if wanted.is_widget:
                    if not callable(wanted.choices):
                        inputs[name] = wanted.options.get("default", _first(wanted.choices, wanted.type))
                    continue
                link = self._source(id, name, wanted.type, inputs.get(name))
                if link is None:
                    return None
                inputs[name] = link
        if not any(self._spec(id).output_node for id in self.result) and not self._end():
            return None
        return self.result

    def _spec(self, id: str) -> NodeSpec:
        return self.specs[self.result[id]["class_type"]]

    def _source(self, id: str, name: str, type: str, given: Any) -> list[Any] | None:
        """What feeds the input `name` of the node `id`: the link as given if it leads somewhere, or the likely one."""
        if isinstance(given, list) and len(given) == 2:
            for source, slot in self._giving(type):
                # A class is no id of a text: both are of one class, and their order tells them apart.
                by_class = name not in ("positive", "negative") and given[0] == self.result[source]["class_type"]
                if slot == given[1] and (given[0] in (source, _number(source)) if self.kept else by_class):
                    return [source, slot]
        found = list(self._giving(type))
        if type == "CONDITIONING" and name in ("positive", "negative"):
            if name == "negative" and len(found) == 1:
                found.append((self._add_empty_text(found[0][0]), 0))
            found = found[1:2] if name == "negative" else found[:1]
        order = list(self.result)
        before = [(source, slot) for source, slot in found if order.index(source) < order.index(id)]
        nearest = (before or [each for each in found if each[0] != id])[-1:]
        return list(nearest[0]) if nearest else None

    def _giving(self, type: str) -> Iterator[tuple[str, int]]:
        """The outputs of that type, in order."""
        for id in self.result:
            for slot, output in enumerate(self._spec(id).output_types):
                if output == type:
                    yield id, slot

    def _add(self, class_type: str, inputs: dict[str, Any], title: str) -> str:
        numbers = [int(id) for id in self.result if id.isdecimal()]
        id = str(max(numbers, default=0) + 1)
        self.result[id] = {"class_type": class_type, "inputs": inputs, "_meta": {"title": title}}
        return id

    def _add_empty_text(self, like: str) -> str:
        """A negative prompt, read by the encoder that reads the positive one."""
        clip = next(([source, slot] for source, slot in self._giving("CLIP")), self.result[like]["inputs"].get("clip"))
        return self._add("CLIPTextEncode", {"text": "", "clip": clip}, "Negative prompt")

    def _end(self) -> bool:
        """Decode and save what nobody takes up; False where there is nothing, or no VAE to decode with."""
        taken = {tuple(value) for each in self.result.values() for value in each["inputs"].values() if _is_link(value)}
        latents = [each for each in self._giving("LATENT") if each not in taken]
        images = [each for each in self._giving("IMAGE") if each not in taken]
        vae = next(self._giving("VAE"), None)
        # Empty latents that nobody takes up are no picture: a sampler's are.
        latents = [each for each in latents if any(not i.is_widget for i in self._spec(each[0]).inputs.values())]
        if vae is not None:
            for source in latents:
                decoded = self._add("VAEDecode", {"samples": list(source), "vae": list(vae)}, "VAE Decode")
                images.append((decoded, 0))
        for image in images:
            self._add("SaveImage", {"images": list(image), "filename_prefix": "ComfyUI"}, "Save Image")
        return bool(images)


def _number(id: str) -> int | None:
    return int(id) if id.isdecimal() else None


def _is_link(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], int)


def _first(choices: Any, type: str) -> Any:
    if isinstance(choices, tuple):
        return choices[0]
    return {"INT": 0, "FLOAT": 0.0, "BOOLEAN": False}.get(type, "")
