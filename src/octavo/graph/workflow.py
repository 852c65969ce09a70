"""Prompts in ComfyUI's API format become a `Workflow`: known nodes, values that fit, links that hold.

A prompt is JSON: `{"6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a cat", "clip": ["4", 1]}}, …}`. What is
wrong with one is told in the shapes of ComfyUI's own answers, so that its web page shows the faults where they are.
Nothing that JSON can hold makes this module fail otherwise. Only what an output node needs is checked; an output whose
nodes are sound is run even if another's are not.

The plain values are the business of `values`, the web page's own format that of `frontend`, files that of `files`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from octavo.errors import RequestError, did_you_mean
from octavo.graph.fragment import as_json, complete, looks_like_nodes
from octavo.graph.spec import Input, Lists, NodeSpec
from octavo.graph.values import Fault, check, fault, shortened

Prompt = Mapping[str, Any]
# What web pages and those who imitate them write among the inputs though it says nothing about the picture: the button
# of nodes that upload files, what becomes of a seed after the run, the microphone of a widespread extension.
UPLOAD_BUTTONS = ("upload", "choose file to upload")
SEED_CONTROL = "control_after_generate"
MICROPHONE = "speak_and_recognation"
DEEPEST = 64  # brackets
MOST_FAULTS = 20  # unknown inputs of one node that are named


class InvalidPrompt(RequestError):  # noqa: N818 - ComfyUI's word for it
    """A prompt that cannot be run; `error` and `node_errors` are ComfyUI's answer to it."""

    def __init__(self, error: Fault, node_errors: Mapping[str, Any] | None = None) -> None:
        self.error = error
        self.node_errors = dict(node_errors or {})
        super().__init__(self._text())

    def _text(self) -> str:
        """Everything that is wrong, for a terminal."""
        first = ": ".join(part for part in (self.error["message"], self.error["details"]) if part)
        lines = [f"The workflow cannot be run. {first}"]
        for node, faults in self.node_errors.items():
            lines += [
                f"  node {node} ({faults['class_type']}): {each['message']}: {each['details']}"
                for each in faults["errors"]
            ]
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Link:
    """What an input takes from another node."""

    node: str
    slot: int


@dataclass(frozen=True, slots=True)
class Node:
    """One node of a workflow, its values converted and checked."""

    id: str
    spec: NodeSpec
    inputs: Mapping[str, Any]  # a value, or a Link
    title: str

    @property
    def links(self) -> Iterator[tuple[str, Link]]:
        """The inputs that come from other nodes."""
        return ((name, value) for name, value in self.inputs.items() if isinstance(value, Link))


@dataclass(frozen=True, slots=True)
class Workflow:
    """A prompt that can be run."""

    nodes: Mapping[str, Node]  # those that the outputs need, in the prompt's order
    outputs: tuple[str, ...]  # the nodes it is run for
    prompt: Prompt  # as it was given
    node_errors: Mapping[str, Any] = field(default_factory=dict)  # faults of outputs that are left out


def validate(
    prompt: Any, nodes: Mapping[str, NodeSpec], lists: Lists, *, targets: Sequence[str] | None = None
) -> Workflow:
    """Check a prompt.

    Args:
        prompt: what JSON gave, of any shape.
        nodes: every node there is, by name.
        lists: the files there are to choose from.
        targets: output nodes to run, by id; every one of the prompt if None.

    Raises:
        InvalidPrompt: it cannot be run; with ComfyUI's `error` and `node_errors`.
    """
    check_depth(prompt)
    if not isinstance(prompt, Mapping):
        raise InvalidPrompt(_not_a_prompt(prompt, nodes))
    if targets is not None and not isinstance(targets, list | tuple):
        what = f"partial_execution_targets is {shortened(targets, 40)!r}"
        raise InvalidPrompt(fault("invalid_prompt", "A list of ids of output nodes is needed", what))
    for id, given in prompt.items():
        _check_class(id, given, nodes)
    outputs = [id for id, given in prompt.items() if nodes[given["class_type"]].output_node]
    if targets is not None:
        outputs = [id for id in outputs if id in targets]
    if not outputs:
        raise InvalidPrompt(_no_outputs(prompt, nodes, targets))
    return _Checker(prompt, nodes, lists).workflow(outputs)


def check_depth(given: Any) -> None:
    """Refuse JSON that could not even be answered: nested deeper than any workflow, or with half characters.

    Raises:
        InvalidPrompt: lists or objects lie in more than `DEEPEST` others, or a text has a lone surrogate.
    """
    level = [given]
    for _ in range(DEEPEST):
        texts = (each for each in level if isinstance(each, str))
        if any(not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text) for text in texts):
            details = "a lone surrogate, half of a character"
            raise InvalidPrompt(fault("invalid_prompt", "The workflow has text that is no Unicode", details))
        level = [
            inner
            for outer in level
            if isinstance(outer, Mapping | list)
            for inner in (*outer, *(outer.values() if isinstance(outer, Mapping) else ()))
        ]
        if not level:
            return
    raise InvalidPrompt(
        fault("invalid_prompt", "The workflow is nested too deeply", f"more than {DEEPEST} brackets lie in each other")
    )


def _not_a_prompt(prompt: Any, nodes: Mapping[str, NodeSpec]) -> Fault:
    if isinstance(prompt, list) and not prompt:
        return fault("prompt_no_outputs", "Prompt has no outputs", "")
    if looks_like_nodes(prompt):
        whole = complete(prompt, nodes)
        message = "This is a piece of a workflow: nodes without ids, so nothing says what feeds what"
        return _with_the_whole("invalid_prompt", message, whole)
    what = "a list" if isinstance(prompt, list) else "null" if prompt is None else f"{shortened(prompt, 40)!r}"
    return fault(
        "invalid_prompt",
        "A prompt is an object of nodes by their ids",
        f'this is {what}; write {{"1": {{"class_type": …, "inputs": {{…}}}}, …}}',
    )


def _no_outputs(prompt: Prompt, nodes: Mapping[str, NodeSpec], targets: Sequence[str] | None) -> Fault:
    message = "Prompt has no outputs"
    if targets is None:
        whole = complete([{**given, "id": id} for id, given in prompt.items()], nodes) if prompt else None
        return _with_the_whole("prompt_no_outputs", message, whole)
    there = [id for id, given in prompt.items() if nodes[given["class_type"]].output_node]
    details = (
        f"of the targets {shortened(list(targets))} none is an output node; there are: {', '.join(there) or 'none'}"
    )
    return fault("prompt_no_outputs", message, details)


def _with_the_whole(type: str, message: str, whole: dict[str, Any] | None) -> Fault:
    """A fault that shows the completed workflow, if it can be guessed."""
    if whole is None:
        return fault(type, message, "")
    details = f"save this as workflow.json and run that:\n{as_json(whole)}"
    return fault(type, message, details, completed=whole)


def _check_class(id: str, given: Any, nodes: Mapping[str, NodeSpec]) -> None:
    """Raise InvalidPrompt unless the node is of a class there is."""
    if not isinstance(given, Mapping):
        details = f"node '{shortened(id)}' is {shortened(given, 40)!r}"
        raise InvalidPrompt(fault("invalid_prompt", "A node is an object with class_type and inputs", details))
    kind, title = given.get("class_type"), _title(given)
    if isinstance(kind, str) and kind in nodes:
        return
    where = f"Node ID '#{id}'"
    if not isinstance(kind, str):
        name, kind = title or f"ID #{id}", None
        message = f"Node '{name}' has no class_type. The workflow may be corrupted or a custom node is missing."
    else:
        message = f"Node '{title or kind}' not found. The custom node may not be installed."
        title = title or kind
        where += did_you_mean(kind, nodes)
    extra = {"node_id": id, "class_type": kind, "node_title": title}
    raise InvalidPrompt(fault("missing_node_type", message, where, **extra))


def _title(given: Mapping[str, Any]) -> str | None:
    meta = given.get("_meta")
    title = meta.get("title") if isinstance(meta, Mapping) else None
    return title if isinstance(title, str) else None


class _Remembered:
    """Lists that look into each folder once."""

    def __init__(self, lists: Lists) -> None:
        self.input_dir, self.output_dir, self.temp_dir = lists.input_dir, lists.output_dir, lists.temp_dir
        self._lists = lists
        self._names: dict[str, Sequence[str]] = {}

    def names(self, category: str) -> Sequence[str]:
        if category not in self._names:
            self._names[category] = self._lists.names(category)
        return self._names[category]


class _Checker:
    """Checks the nodes that outputs need, each once, however many need it."""

    def __init__(self, prompt: Prompt, specs: Mapping[str, NodeSpec], lists: Lists) -> None:
        self.prompt, self.specs, self.lists = prompt, specs, _Remembered(lists)
        self.sound: dict[str, Node] = {}
        self.faults: dict[str, list[Fault]] = {}
        self.links: dict[str, list[tuple[str, Link]]] = {}
        self.straight: set[str] = set()  # nodes above which no links run in a circle
        self.reached: dict[str, tuple[str, str]] = {}  # by which node, through which input of it

    def workflow(self, outputs: Sequence[str]) -> Workflow:
        """What can be run of `outputs`; InvalidPrompt if it is nothing."""
        good, needed_by_good, node_errors, circles = list[str](), set[str](), dict[str, Any](), dict[str, str]()
        for output in outputs:
            needed = self._ancestors(output)
            bad = [id for id in needed if self.faults[id]]
            circle = None if bad else self._circle(output)
            for id in bad:
                entry = {"errors": self.faults[id], "dependent_outputs": [], "class_type": self._class(id)}
                node_errors.setdefault(id, entry)["dependent_outputs"].append(output)
            if circle is not None:
                circles[output] = circle
            elif not bad:
                good.append(output)
                needed_by_good |= needed.keys()
        if not good:
            message = "Prompt outputs failed validation"
            details = "; ".join(dict.fromkeys(circles.values()))
            raise InvalidPrompt(fault("prompt_outputs_failed_validation", message, details), node_errors)
        for output, circle in circles.items():
            errors = [fault("dependency_cycle", "The links run in a circle", circle)]
            node_errors[output] = {"errors": errors, "dependent_outputs": [output], "class_type": self._class(output)}
        nodes = {id: self.sound[id] for id in self.prompt if id in needed_by_good}
        return Workflow(nodes, tuple(good), self.prompt, node_errors)

    def _class(self, id: str) -> str:
        kind: str = self.prompt[id]["class_type"]
        return kind

    def _ancestors(self, output: str) -> dict[str, None]:
        """Every node that `output` needs, itself first; each is checked when first met."""
        met: dict[str, None] = {}
        waiting = [output]
        while waiting:
            id = waiting.pop()
            if id in met:
                continue
            met[id] = None
            if id not in self.faults:
                self._check(id)
            for name, link in self.links[id]:
                self.reached.setdefault(link.node, (id, name))
                waiting.append(link.node)
        return met

    def _circle(self, output: str) -> str | None:
        """The links that run in a circle above `output`, in words; None if there are none."""
        path: dict[str, None] = {}  # from the output upwards
        ahead: list[Iterator[str]] = [iter([output])]
        while ahead:
            id = next(ahead[-1], None)
            if id is None:
                ahead.pop()
                if path:
                    self.straight.add(path.popitem()[0])
            elif id in path:
                above = list(path)
                circle = [*above[above.index(id) :], id]
                return f"the links run in a circle: {' ← '.join(shortened(each, 40) for each in circle[:12])}"
            elif id not in self.straight:
                path[id] = None
                ahead.append(iter([link.node for _, link in self.links[id]]))
        return None

    def _check(self, id: str) -> None:
        """Check one node by itself, filling `faults`, `links` and, if there is nothing wrong, `sound`."""
        given = self.prompt[id]
        spec = self.specs[given["class_type"]]
        self.faults[id], self.links[id] = faults, links = [], []
        inputs = given.get("inputs", {})
        if not isinstance(inputs, Mapping):
            faults.append(fault("invalid_inputs", "The inputs of a node are an object", shortened(inputs, 40)))
            return
        values: dict[str, Any] = {}
        for name, wanted in spec.inputs.items():
            if wanted.section == "hidden":
                continue
            if name in inputs:
                value, wrong = self._checked(id, name, wanted, inputs[name])
                if isinstance(value, Link):
                    links.append((name, value))
                values[name] = value
                faults += [wrong] if wrong else []
            elif wanted.added_later:
                values[name] = wanted.default(self.lists)
            elif wanted.section == "required":
                faults.append(fault("required_input_missing", "Required input is missing", name, input_name=name))
        faults += islice(self._unknown(spec, inputs), MOST_FAULTS)
        if not faults:
            self.sound[id] = Node(id, spec, values, _title(given) or spec.display_name or spec.name)

    def _checked(self, id: str, name: str, wanted: Input, value: Any) -> tuple[Any, Fault | None]:
        """The input's value, or its link if that leads somewhere; and what is wrong with it."""
        if isinstance(value, Mapping) and "__value__" in value:  # how the web page writes a list that is no link
            value = value["__value__"]
        elif isinstance(value, list):
            return self._linked(id, name, wanted, value)
        if wanted.is_widget or wanted.type == "*":
            return check(name, wanted, value, self.lists, classic=self.specs[self._class(id)].classic)
        return None, fault(
            "invalid_input_type",
            f"Failed to convert an input value to a {wanted.type} value",
            f"{name}, {shortened(value)}, it comes from another node: link it to an output of that type",
            **self._about(id, name),
            received_value=value,
        )

    def _about(self, id: str, name: str) -> dict[str, Any]:
        """What answers repeat of an input's declaration."""
        spec = self.specs[self._class(id)]
        config = spec.inputs[name].object_info(self.lists, classic=spec.classic)
        return {"input_name": name, "input_config": config}

    def _linked(self, id: str, name: str, wanted: Input, value: list[Any]) -> tuple[Any, Fault | None]:
        if len(value) != 2:
            message = "Bad linked input, must be a length-2 list of [node_id, slot_index]"
            return None, fault("bad_linked_input", message, name, **self._about(id, name), received_value=value)
        source, slot = value
        if isinstance(source, int) and not isinstance(source, bool):
            source = str(source)  # as people write it by hand; ids are texts
        if not isinstance(source, str) or source not in self.prompt:
            return None, self._broken(id, "KeyError", f"{name}: there is no node {shortened(source)!r}")
        outputs = self.specs[self._class(source)].output_types
        if not isinstance(slot, int) or isinstance(slot, bool) or not 0 <= slot < len(outputs):
            kind = "IndexError" if isinstance(slot, int) else "TypeError"
            text = f"{name}: {self._class(source)} has no output {shortened(slot)}, only {len(outputs)} counted from 0"
            return None, self._broken(id, kind, text)
        link = Link(source, slot)
        if not _fits(outputs[slot], wanted.type):
            details = f"{name}, received_type({outputs[slot]}) mismatch input_type({wanted.type})"
            message = "Return type mismatch between linked nodes"
            given = {"received_type": outputs[slot], "linked_node": value}
            return None, fault("return_type_mismatch", message, details, **self._about(id, name), **given)
        return link, None

    def _broken(self, id: str, kind: str, text: str) -> Fault:
        """A link into nothing: ComfyUI stumbles over it while checking the node that this one feeds, and says so."""
        extra: dict[str, Any] = {"exception_type": kind, "traceback": []}
        if id not in self.reached:
            return fault("exception_during_validation", "Exception when validating node", text, **extra)
        by, name = self.reached[id]
        about = {
            **self._about(by, name),
            "exception_message": text,
            **extra,
            "linked_node": self.prompt[by]["inputs"][name],
        }
        message = "Exception when validating inner node"
        return fault("exception_during_inner_validation", message, text, **about)

    def _unknown(self, spec: NodeSpec, inputs: Mapping[str, Any]) -> Iterable[Fault]:
        """An input that the node does not have is a misunderstanding; ComfyUI passes over it without a word."""
        idle = {MICROPHONE}
        for wanted in spec.inputs.values():
            idle |= {*UPLOAD_BUTTONS} if "image_upload" in wanted.options else set()
            idle |= {SEED_CONTROL} if SEED_CONTROL in wanted.options else set()
        for name, value in inputs.items():
            if name in spec.inputs or name in idle:
                continue
            known = [each for each, wanted in spec.inputs.items() if wanted.section != "hidden"]
            hint = did_you_mean(name, known) or f" It has: {', '.join(known) or 'none'}."
            details = f"{shortened(name)}: {spec.name} has no such input.{hint}"
            yield fault("unknown_input", "Unknown input", details, input_name=name, received_value=value)


def _fits(given: str, wanted: str) -> bool:
    """Whether an output of the type `given` may feed an input of the type `wanted`; either may list types by commas."""
    if "*" in (given, wanted):
        return True
    return bool({one.strip() for one in given.split(",")} & {one.strip() for one in wanted.split(",")})
