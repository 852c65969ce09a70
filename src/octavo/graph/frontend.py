"""The web page's own format becomes a prompt: what ComfyUI's page does when "Queue" is pressed.

A page keeps nodes with their places on the screen, links by number, and the values of widgets in the order in which the
node shows them: `{"nodes": [{"id": 3, "type": "KSampler", "inputs": [{"name": "model", "link": 10}], "widgets_values":
[1, "randomize", 20, …]}], "links": [[10, 4, 0, 3, 0, "MODEL"]]}`. Nodes that exist on the page alone vanish here:
reroutes, primitives and notes; so do muted nodes, bypassed ones, and subgraphs, whose nodes get ids such as "57:8".
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

from octavo.graph.dynamic import choose
from octavo.graph.spec import Input, Lists, NodeSpec
from octavo.graph.values import fault, shortened
from octavo.graph.workflow import InvalidPrompt, check_depth

MUTED, BYPASSED = 2, 4
NOTES = ("Note", "MarkdownNote")
CONTROLS = ("fixed", "increment", "increment-wrap", "decrement", "randomize")  # what to do with a seed after a run
IDLE = (None, "", [False, True])  # values of widgets that do nothing; the last is an extension's microphone
SUBGRAPH_INPUT, SUBGRAPH_OUTPUT = -10, -20  # the ids of a subgraph's own ends
DEEPEST = 16  # subgraphs in each other
MOST_NODES = 10_000  # once all subgraphs are unfolded
OWN = "-1"  # in a subgraph's list of promoted widgets: an input of its own

Id = int | str


def is_frontend_format(given: Any) -> bool:
    """Whether this is a page's workflow rather than a prompt."""
    return isinstance(given, Mapping) and isinstance(given.get("nodes"), list) and "class_type" not in given


def to_prompt(given: Any, specs: Mapping[str, NodeSpec], lists: Lists) -> dict[str, Any]:
    """A page's workflow in the API format.

    Where a text offers choices, `{red|green}`, one is taken by lot, as the page does at each run.

    Args:
        given: what JSON gave.
        specs: every node there is; a type that is not among them is left for `workflow.validate` to tell.
        lists: the files there are, for values that the workflow does not have.

    Raises:
        InvalidPrompt: it is damaged, or has what Octavo does not read (group nodes).
    """
    check_depth(given)
    if not is_frontend_format(given):
        raise _damaged("there is no list of nodes")
    definitions = {each.id: each for each in _definitions(given)}
    page = _Scope(_parse(given["nodes"], given.get("links"), "the page"), definitions)
    active = list(islice(page.active(), MOST_NODES + 1))
    if len(active) > MOST_NODES:
        raise _damaged(f"its subgraphs hold more than {MOST_NODES} nodes")
    return {id: _as_api(scope, node, id, specs, lists) for id, scope, node in active}


# ── reading what the page wrote ──────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class _Slot:
    """One input of a node on the page."""

    name: str
    type: str
    link: Id | None
    is_widget: bool


@dataclass(frozen=True, slots=True)
class _Node:
    id: str
    type: str
    mode: int
    inputs: tuple[_Slot, ...]
    values: Any  # of its widgets: a list in their order, an object by name, or None
    title: str | None
    promoted: tuple[tuple[str, str], ...]  # of a subgraph: (inner node or OWN, name of a widget) for each of `values`


@dataclass(frozen=True, slots=True)
class _Link:
    origin: str
    slot: int
    target: str
    target_slot: int


@dataclass(frozen=True, slots=True)
class _Graph:
    """The nodes and links of the page, or of a subgraph."""

    nodes: Mapping[str, _Node]
    links: Mapping[Id, _Link]


@dataclass(frozen=True, slots=True)
class _Definition:
    """A subgraph, which nodes on the page stand for."""

    id: str
    name: str
    graph: _Graph
    inputs: tuple[str, ...]  # names


def _damaged(what: str) -> InvalidPrompt:
    return InvalidPrompt(fault("invalid_workflow", "This is no workflow that the web page could have saved", what))


def _parse(nodes: Any, links: Any, where: str) -> _Graph:
    parsed = {}
    for given in _objects(nodes, f"nodes of {where}"):
        node = _parse_node(given, where)
        parsed[node.id] = node
    return _Graph(parsed, dict(_parse_links(links, where)))


def _objects(given: Any, what: str) -> list[Mapping[str, Any]]:
    if given is None:
        return []
    if not isinstance(given, list) or not all(isinstance(each, Mapping) for each in given):
        raise _damaged(f"the {what} are no list of objects")
    return given


def _parse_node(given: Mapping[str, Any], where: str) -> _Node:
    id, type, mode = given.get("id"), given.get("type"), given.get("mode", 0)
    if not _is_id(id) or not isinstance(type, str):
        raise _damaged(f"a node of {where} has no id or type: {shortened(given, 60)}")
    about = f"node {id} ({shortened(type, 40)}) of {where}"
    if type.startswith(("workflow>", "workflow/")):
        raise InvalidPrompt(
            fault(
                "invalid_workflow",
                "The workflow has a group node, which Octavo does not read",
                f"{about}: open it in ComfyUI and choose 'Convert to nodes' or 'Convert to subgraph'",
            )
        )
    slots = []
    for slot in _objects(given.get("inputs"), f"inputs of {about}"):
        name, link = slot.get("name"), slot.get("link")
        if not isinstance(name, str) or not (link is None or _is_id(link)):
            raise _damaged(f"an input of {about} has no name or an odd link")
        slots.append(_Slot(name, str(slot.get("type")), link, isinstance(slot.get("widget"), Mapping)))
    values = given.get("widgets_values")
    if not (values is None or isinstance(values, list | Mapping)):
        raise _damaged(f"the values of {about} are neither a list nor an object")
    title, properties = given.get("title"), given.get("properties")
    promoted = properties.get("proxyWidgets") if isinstance(properties, Mapping) else None
    pairs = promoted if isinstance(promoted, list) else []
    return _Node(
        id=str(id),
        type=type,
        mode=mode if isinstance(mode, int) else 0,
        inputs=tuple(slots),
        values=values,
        title=title if isinstance(title, str) and title else None,
        promoted=tuple((str(pair[0]), str(pair[1])) for pair in pairs if isinstance(pair, list) and len(pair) >= 2),
    )


def _parse_links(given: Any, where: str) -> Iterator[tuple[Id, _Link]]:
    """Links in either form: `[id, origin, slot, target, slot, type]`, or an object of these names."""
    if given is None:
        return
    if not isinstance(given, list):
        raise _damaged(f"the links of {where} are no list")
    for link in given:
        if link is None:
            continue  # pages have left holes
        if isinstance(link, Mapping):
            names = ("id", "origin_id", "origin_slot", "target_id", "target_slot")
            link = [link.get(name) for name in names]
        if not isinstance(link, list) or len(link) < 5 or not all(_is_id(each) for each in link[:5]):
            raise _damaged(f"a link of {where} cannot be read: {shortened(link, 60)}")
        id, origin, slot, target, target_slot = link[:5]
        if not isinstance(slot, int) or not isinstance(target_slot, int):
            raise _damaged(f"link {id} of {where} has odd slots")
        yield id, _Link(str(origin), slot, str(target), target_slot)


def _is_id(given: Any) -> bool:
    return isinstance(given, int | str) and not isinstance(given, bool)


def _definitions(given: Mapping[str, Any]) -> Iterator[_Definition]:
    definitions = given.get("definitions")
    if not isinstance(definitions, Mapping):
        return
    for each in _objects(definitions.get("subgraphs"), "subgraphs"):
        id, name = each.get("id"), each.get("name")
        if not isinstance(id, str):
            raise _damaged("a subgraph has no id")
        title = name if isinstance(name, str) else id
        inputs = tuple(str(slot.get("name")) for slot in _objects(each.get("inputs"), f"inputs of subgraph {title}"))
        yield _Definition(id, title, _parse(each.get("nodes"), each.get("links"), f"subgraph '{title}'"), inputs)


# ── following links ──────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class _Value:
    """What an input gets from a primitive, or from a widget of a subgraph."""

    value: Any


_Source = list[Any] | _Value | None  # a link of the API format, a value, or nothing


@dataclass(slots=True)
class _Scope:
    """The page, or one subgraph node with what is in it."""

    graph: _Graph
    definitions: Mapping[str, _Definition]
    prefix: str = ""
    definition: _Definition | None = None
    outer: "_Scope | None" = None
    node: _Node | None = None  # that stands for this subgraph
    depth: int = 0
    inner: dict[str, "_Scope"] = field(default_factory=dict)

    def entered(self, node: _Node) -> "_Scope":
        """What is in a subgraph node."""
        if node.id not in self.inner:
            definition = self.definitions[node.type]
            if self.depth >= DEEPEST:
                raise _damaged(f"subgraph '{definition.name}' lies in more than {DEEPEST} others, or in itself")
            prefix = f"{self.prefix}{node.id}:"
            self.inner[node.id] = _Scope(
                definition.graph, self.definitions, prefix, definition, self, node, self.depth + 1
            )
        return self.inner[node.id]

    def active(self) -> Iterator[tuple[str, "_Scope", _Node]]:
        """Every node that does something, with its id in the prompt."""
        for node in self.graph.nodes.values():
            if node.mode in (MUTED, BYPASSED) or node.type in (*NOTES, "Reroute", "PrimitiveNode"):
                continue
            if node.type in self.definitions:
                yield from self.entered(node).active()
            else:
                yield self.prefix + node.id, self, node

    def source(self, link: Id | None) -> _Source:
        """Where a link comes from, past all that vanishes."""
        scope, passed = self, set[tuple[str, Id]]()
        while link is not None:
            if (scope.prefix, link) in passed:
                return None  # reroutes in a circle
            passed.add((scope.prefix, link))
            found = scope.graph.links.get(link)
            if found is None:
                return None
            if scope.definition is not None and found.origin == str(SUBGRAPH_INPUT):
                scope, link, value = scope._from_outside(found.slot)
                if value is not None:
                    return value
                continue
            node = scope.graph.nodes.get(found.origin)
            if node is None or node.mode == MUTED:
                return None
            if node.mode == BYPASSED or node.type == "Reroute":
                link = _straight_through(node, found.slot, self._type_at(scope, link))
            elif node.type == "PrimitiveNode":
                return _Value(node.values[0]) if isinstance(node.values, list) and node.values else None
            elif node.type in scope.definitions:
                scope = scope.entered(node)
                ends = scope.graph.links.items()
                outputs = (
                    id for id, end in ends if end.target == str(SUBGRAPH_OUTPUT) and end.target_slot == found.slot
                )
                link = next(outputs, None)
            else:
                return [scope.prefix + node.id, found.slot]
        return None

    def _from_outside(self, slot: int) -> tuple["_Scope", Id | None, _Value | None]:
        """What feeds an input of this subgraph: where to look on, or the value of its widget."""
        assert self.definition is not None
        assert self.outer is not None
        assert self.node is not None
        if not 0 <= slot < len(self.definition.inputs):
            raise _damaged(f"subgraph '{self.definition.name}' has no input {slot}")
        name = self.definition.inputs[slot]
        given = next((each for each in self.node.inputs if each.name == name), None)
        if given is not None and given.link is not None:
            return self.outer, given.link, None
        values = self.promoted
        return self.outer, None, _Value(values[OWN, name]) if (OWN, name) in values else None

    @property
    def promoted(self) -> dict[tuple[str, str], Any]:
        """Values that a subgraph node shows for widgets within it, by inner node (or OWN) and name.

        Pages have saved lists of names and values that do not match. What is in the subgraph then holds.
        """
        assert self.node is not None
        values = self.node.values
        if isinstance(values, Mapping):
            return {(OWN, str(name)): value for name, value in values.items()}
        names = self.node.promoted or [(OWN, slot.name) for slot in self.node.inputs if slot.is_widget]
        return dict(zip(names, values, strict=True)) if values and len(names) == len(values) else {}

    def _type_at(self, scope: "_Scope", link: Id) -> str:
        """The type of the input that a link feeds."""
        found = scope.graph.links[link]
        target = scope.graph.nodes.get(found.target)
        if target is None or not 0 <= found.target_slot < len(target.inputs):
            return "*"
        return target.inputs[found.target_slot].type


def _straight_through(node: _Node, slot: int, type: str) -> Id | None:
    """The link that a bypassed node hands on: of the input at the output's place, or the first, of the type wanted."""
    if node.type == "Reroute":
        return node.inputs[0].link if node.inputs else None
    at_its_place = node.inputs[slot : slot + 1] if slot >= 0 else ()
    if type == "*":
        return at_its_place[0].link if at_its_place else None
    return next(
        (each.link for each in (*at_its_place, *node.inputs) if each.link is not None and each.type == type), None
    )


# ── values ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _as_api(scope: _Scope, node: _Node, id: str, specs: Mapping[str, NodeSpec], lists: Lists) -> dict[str, Any]:
    """One node of the prompt."""
    spec = specs.get(node.type)
    inputs: dict[str, Any] = {}
    if spec is not None:
        inputs = {
            name: _settled(spec.inputs[name], value) for name, value in _widget_values(node, spec, id, lists).items()
        }
        for (inner, name), value in scope.promoted.items() if scope.node is not None else ():
            if inner == node.id and name in inputs:
                inputs[name] = _settled(spec.inputs[name], value)
    for slot in node.inputs:
        source = scope.source(slot.link)
        if isinstance(source, _Value):
            inputs[slot.name] = source.value
        elif source is not None:
            inputs[slot.name] = source
    title = node.title or (spec and spec.display_name) or node.type
    return {"inputs": inputs, "class_type": node.type, "_meta": {"title": title}}


def _widget_values(node: _Node, spec: NodeSpec, id: str, lists: Lists) -> dict[str, Any]:
    """The values of a node's widgets by name; the default where the page has none."""
    widgets = [(name, each) for name, each in _in_shown_order(spec) if each.is_widget]
    defaults = {name: each.default(lists) for name, each in widgets}
    values = node.values
    if isinstance(values, Mapping):
        return {**defaults, **{name: value for name, value in values.items() if name in defaults}}
    given, left = dict[str, Any](), list(values or ())
    for name, each in widgets:
        if not left:
            break
        given[name] = left.pop(0)
        if each.options.get("control_after_generate") and left and left[0] in CONTROLS:
            left.pop(0)
        if "image_upload" in each.options and left and left[0] in ("image", None, ""):
            left.pop(0)  # the button
    if widgets and any(value not in IDLE for value in left):
        details = f"node {id} ({node.type}) has {len(widgets)} values here; {shortened(left, 80)} is left over"
        raise InvalidPrompt(fault("invalid_workflow", "A node has values that Octavo does not know of", details))
    return {**defaults, **given}


def _in_shown_order(spec: NodeSpec) -> Sequence[tuple[str, Input]]:
    """Inputs as the page shows them: the required ones first."""
    sections: tuple[Literal["required", "optional"], ...] = ("required", "optional")
    return [(name, each) for section in sections for name, each in spec.inputs.items() if each.section == section]


def _settled(wanted: Input, value: Any) -> Any:
    """A value as it goes into the prompt: a list is marked as no link, a text's choices are made."""
    if isinstance(value, list):
        return {"__value__": value}
    if wanted.options.get("dynamicPrompts") and isinstance(value, str):
        return choose(value)
    return value
