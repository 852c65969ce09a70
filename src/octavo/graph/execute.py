"""Runs a checked workflow: only what its outputs need, each node once, in the order of the links.

Results are kept in a `Cache` by content: a node is run again only if its values, the nodes above it, or a file that it
reads have changed. What happens is told in ComfyUI's messages, in the order recorded from it. Nodes and models are
nothing that this module knows: a workflow brings its nodes, and a context what they use.
"""

import hashlib
import heapq
import json
import time
import traceback
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

from octavo.errors import JobError, OctavoError, RequestError
from octavo.graph.cache import Cache, Result
from octavo.graph.spec import NodeResult, NodeSpec
from octavo.graph.values import check as check_value
from octavo.graph.values import shortened
from octavo.graph.workflow import Link, Node, Workflow

Emit = Callable[[str, dict[str, Any]], None]
Report = Callable[[float, float, Any], None]
Lent = TypeVar("Lent", bound="Lends")
MOST_STATES = 200  # nodes whose state a message tells
STOPPED = (JobError, KeyboardInterrupt)  # somebody wants it to end; any other exception is the node's


class Lends(Protocol):
    """What the executor itself asks of a context; `graph.context.Context` has it, and more for the nodes."""

    def for_node(self: Lent, node_id: str, report: Report) -> Lent:
        """The same in the hands of one node, which tells its progress by `report`."""
        ...

    @property
    def check(self) -> Callable[[], None]:
        """Raises when the run is to end."""
        ...


class NodeFailedError(JobError):
    """A node could not do its work; `details` are the data of ComfyUI's `execution_error`."""


class Executor:
    """Runs workflows, any number at once.

    Args:
        cache: shared by all that run.
        still_there: asked of what a cached output node showed ({"images": [...]}); False has it run again.
    """

    def __init__(self, cache: Cache, *, still_there: Callable[[Mapping[str, Any]], bool] = lambda _ui: True) -> None:
        self.cache = cache
        self._still_there = still_there

    def run(self, workflow: Workflow, context: Lends, emit: Emit, *, prompt_id: str = "") -> dict[str, Any]:
        """Run it.

        Args:
            context: lent to the nodes.
            emit: is told every message, as (type, data): execution_start, execution_cached, executing, progress,
                progress_state, preview, executed, and execution_success, execution_error or execution_interrupted as
                the last. A "preview" has `image`, a picture or a function that makes one, and is no message of
                ComfyUI's by itself: there it is binary.
            prompt_id: repeated in every message.

        Returns:
            What each node that shows something showed, by id: {"9": {"images": [{"filename": …}]}}.

        Raises:
            NodeFailedError: a node failed.
            JobError, KeyboardInterrupt: what `context.check` or the user raised.
        """
        return _Run(self.cache, self._still_there, workflow, context, emit, prompt_id).run()


class _Run:
    """One workflow under way."""

    def __init__(
        self,
        cache: Cache,
        still_there: Callable[[Mapping[str, Any]], bool],
        workflow: Workflow,
        context: Lends,
        emit: Emit,
        prompt_id: str,
    ) -> None:
        self.cache, self.still_there = cache, still_there
        self.nodes, self.workflow = workflow.nodes, workflow
        self.context, self.emit, self.prompt_id = context, emit, prompt_id
        self.signatures: dict[str, str] = {}
        self.results: dict[str, Result] = {}  # of this run, while somebody still needs them
        self.waiting_for: dict[str, set[str]] = {}
        self.feeds: dict[str, list[str]] = {}
        self.uses: Counter[str] = Counter()
        self.place: dict[str, int] = {}  # in the order in which nodes were found to be needed
        self.states: dict[str, dict[str, Any]] = {}
        self.executed: list[str] = []
        self.shown: dict[str, Any] = {}
        self.saved: dict[str, Result] = {}  # results of output nodes, cached once all is done
        self.current: Node | None = None

    def run(self) -> dict[str, Any]:
        self._tell("execution_start", timestamp=_now())
        try:
            self._sign()
            cached = [id for id in self.nodes if self.signatures[id] in self.cache]
            self._tell("execution_cached", nodes=cached, timestamp=_now())
            order = self._plan()
            while order:
                _, _, id = heapq.heappop(order)
                self.context.check()
                self.current = self.nodes[id]
                self._do(self.current)
                for fed in self._done(id):
                    heapq.heappush(order, self._ranked(fed))
        except STOPPED:
            self._interrupted()
            raise
        except Exception as error:
            raise self._failed(error) from error
        for id, result in self.saved.items():
            self.cache.put(self.signatures[id], result)
        self._tell("execution_success", timestamp=_now())
        return self.shown

    # ── what is to be done ───────────────────────────────────────────────────────────────────────────────────────

    def _sign(self) -> None:
        """The signature of every node, sources before what they feed."""
        for id in _sources_first(self.nodes):
            node = self.nodes[id]
            self.current = node
            inputs = {
                name: ["link", self.signatures[value.node], value.slot] if isinstance(value, Link) else ["value", value]
                for name, value in sorted(node.inputs.items())
            }
            changed = self._outside(node) if node.spec.is_changed else None
            text = json.dumps([node.spec.name, inputs, changed], default=repr)
            self.signatures[id] = hashlib.sha256(text.encode()).hexdigest()
        self.current = None

    def _outside(self, node: Node) -> str:
        """What the node's result depends on beside its inputs; something new each time where nobody can tell."""
        assert node.spec.is_changed is not None
        values = {name: None if isinstance(value, Link) else value for name, value in node.inputs.items()}
        try:
            found = node.spec.is_changed(self.context.for_node(node.id, _unheard), **values)
        except (OSError, OctavoError):
            return uuid.uuid4().hex  # it cannot be read, as the node itself will tell
        return uuid.uuid4().hex if type(found) is object else repr(found)

    def _plan(self) -> list[tuple[int, int, str]]:
        """Find what is to be run, from the outputs upwards, stopping at what is cached; gives what can start at once.

        Nodes come up as ComfyUI's do: the last input of a node first.
        """
        stack = list(reversed(self.workflow.outputs))
        while stack:
            id = stack.pop()
            if id in self.waiting_for:
                continue
            if id in self.workflow.outputs and self._known_output(id):
                self.waiting_for[id] = set()
                continue
            sources = [link.node for _, link in self.nodes[id].links]
            for source in dict.fromkeys(sources):
                known = None if source in self.results else self.cache.get(self.signatures[source])
                if known is not None and not self.nodes[source].spec.output_node:
                    self.results[source] = known
            missing = [source for source in sources if source not in self.results]
            self.waiting_for[id] = set(missing)
            for source in sources:
                self.uses[source] += 1
                self.feeds.setdefault(source, []).append(id)
            stack += missing
        self.place = {id: number for number, id in enumerate(self.waiting_for)}
        ready = [self._ranked(id) for id, missing in self.waiting_for.items() if not missing]
        heapq.heapify(ready)
        return ready

    def _known_output(self, id: str) -> bool:
        """Whether an output node's result is cached and what it showed is still there; then it is a result of ours."""
        known = self.cache.get(self.signatures[id])
        if known is not None and known.ui is not None and not self.still_there(known.ui):
            self.cache.drop(self.signatures[id])
            return False
        if known is not None:
            self.results[id] = known
        return known is not None

    def _ranked(self, id: str) -> tuple[int, int, str]:
        """What is run first of all that could be: outputs, then what they need at last, then the order of discovery."""
        last = any(self.nodes[fed].spec.output_node for fed in self.feeds.get(id, ()))
        return (0 if self.nodes[id].spec.output_node else 1 if last else 2, self.place[id], id)

    def _done(self, id: str) -> list[str]:
        """Note that a node is done: what can run now, and what nobody needs any more."""
        ready = []
        for fed in dict.fromkeys(self.feeds.get(id, ())):
            self.waiting_for[fed].discard(id)
            if not self.waiting_for[fed]:
                ready.append(fed)
        for _, link in self.nodes[id].links:
            self.uses[link.node] -= 1
            if self.uses[link.node] <= 0:
                self.results.pop(link.node, None)
        return ready

    # ── one node ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _do(self, node: Node) -> None:
        """Run a node, or show again what it showed."""
        if node.id in self.results:
            self._show(node, self.results[node.id])
            self._state(node.id, "finished", 1, 1)
            return
        self._state(node.id, "running", 0.0, 1.0)
        self._tell("executing", node=node.id, display_node=node.id)
        context = self.context.for_node(node.id, lambda value, most, image: self._progress(node.id, value, most, image))
        arguments = {
            name: self.results[value.node].outputs[value.slot] if isinstance(value, Link) else [value]
            for name, value in node.inputs.items()
        }

        def work() -> Result:
            return call(node.spec, context, arguments, linked={name for name, _ in node.links})

        if node.spec.output_node:
            # Files belong to the run that writes them: another may not lean on them before this one has ended well.
            result = self.saved[node.id] = work()
        else:
            result = self.cache.compute(self.signatures[node.id], work, self.context.check)
        self.results[node.id] = result
        self.executed.append(node.id)
        self._show(node, result)
        state = self.states[node.id]
        self._state(node.id, "finished", state["max"], state["max"])

    def _show(self, node: Node, result: Result) -> None:
        if result.ui is not None:
            self.shown[node.id] = dict(result.ui)
            self._tell("executed", node=node.id, display_node=node.id, output=dict(result.ui))

    # ── what is told ─────────────────────────────────────────────────────────────────────────────────────────────

    def _tell(self, type: str, **data: Any) -> None:
        self.emit(type, {**data, "prompt_id": self.prompt_id})

    def _state(self, id: str, state: str, value: float, most: float) -> None:
        about = {"node_id": id, "prompt_id": self.prompt_id, **_display(id)}
        self.states[id] = {"value": value, "max": most, "state": state, **about}
        if len(self.states) > MOST_STATES:  # each message repeats them all
            self.states.pop(next(iter(self.states)))
        self._tell("progress_state", nodes={id: dict(state) for id, state in self.states.items()})

    def _progress(self, id: str, value: float, most: float, image: Any) -> None:
        self._state(id, "running", value, most)
        if image is not None:
            self._tell("preview", node_id=id, **_display(id), image=image)
        self._tell("progress", value=value, max=most, node=id)

    def _interrupted(self) -> None:
        node = self.current
        at = {"node_id": node and node.id, "node_type": node and node.spec.name}
        self._tell("execution_interrupted", **at, executed=list(self.executed), timestamp=_now())

    def _failed(self, error: Exception) -> NodeFailedError:
        """Tell of a failure in ComfyUI's fields, and make it an error of ours."""
        node = self.current
        assert node is not None, "only nodes fail here"
        ours = isinstance(error, OctavoError)
        kind = type(error)
        inputs = {
            name: self.results[value.node].outputs[value.slot] if isinstance(value, Link) else [value]
            for name, value in node.inputs.items()
            if not isinstance(value, Link) or value.node in self.results
        }
        data = {
            "prompt_id": self.prompt_id,
            "node_id": node.id,
            "node_type": node.spec.name,
            "executed": list(self.executed),
            "exception_message": str(error),
            "exception_type": kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}",
            # Where a fault of ours is, without the folders of this machine; the user's own mistakes need none.
            "traceback": [] if ours else _places(error),
            "current_inputs": {name: [_described(each) for each in items] for name, items in inputs.items()},
            "current_outputs": list(dict.fromkeys([*self.executed, node.id])),
            "timestamp": _now(),
        }
        self.emit("execution_error", data)
        what = str(error) if ours else f"{data['exception_type']}: {error}"
        return NodeFailedError(f"Node {node.id} ({node.title}): {what}", details=data)


def call(
    spec: NodeSpec, context: Any, arguments: Mapping[str, list[Any]], *, linked: set[str] | frozenset[str] = frozenset()
) -> Result:
    """Run a node's function on the items of its inputs.

    A node that wants lists is called once. Any other is called once for each item of its longest input, where the last
    item of a shorter one stands for those that it lacks.

    Args:
        arguments: the items of each input.
        linked: inputs whose values come from other nodes, and are checked only now.

    Raises:
        RequestError: an input has no item, or a linked value will not do.
        Whatever the node raises.
    """
    arguments = {
        name: [_fitting(name, spec, value) for value in items] if name in linked else items
        for name, items in arguments.items()
    }
    if spec.input_is_list:
        given = [spec.run(context, **arguments)]
    else:
        empty = [name for name, items in arguments.items() if not items]
        if empty:
            raise RequestError(f"{', '.join(empty)}: the list that comes from the node before has no items.")
        count = max((len(items) for items in arguments.values()), default=1)
        given = [
            spec.run(context, **{name: items[min(index, len(items) - 1)] for name, items in arguments.items()})
            for index in range(count)
        ]
    results = [each if isinstance(each, NodeResult) else NodeResult(each) for each in given]
    outputs: tuple[list[Any], ...] = tuple([] for _ in spec.outputs)
    for result in results:
        assert len(result.outputs) == len(outputs), f"{spec.name} gave {len(result.outputs)} outputs"
        for items, output, is_list in zip(outputs, result.outputs, spec.list_outputs, strict=True):
            items.extend(output if is_list else [output])
    shown = [result.ui for result in results if result.ui]
    ui = {key: [item for each in shown for item in each.get(key, ())] for key in shown[0]} if shown else None
    return Result(outputs, ui)


def _fitting(name: str, spec: NodeSpec, value: Any) -> Any:
    """A value that came from another node, checked as one that was typed in is."""
    wanted = spec.inputs[name]
    if not wanted.is_widget:
        return value
    value, wrong = check_value(name, wanted, value)
    if wrong is not None:
        raise RequestError(f"{name}: {wrong['message']} ({wrong['details']}).")
    return value


def _sources_first(nodes: Mapping[str, Node]) -> list[str]:
    """Every node after those that it is linked to."""
    ordered: dict[str, None] = {}
    for start in nodes:
        stack = [start]
        while stack:
            id = stack[-1]
            missing = [link.node for _, link in nodes[id].links if link.node not in ordered]
            if id in ordered or not missing:
                ordered[id] = None
                stack.pop()
            else:
                stack += missing
    return list(ordered)


def _display(id: str) -> dict[str, Any]:
    return {"display_node_id": id, "parent_node_id": None, "real_node_id": id}


def _described(value: Any) -> str:
    """A value as a report of an error shows it: plain values as they are, of all else the kind."""
    if isinstance(value, str | int | float | None):
        return shortened(value)
    shape = getattr(value, "shape", None)
    return f"<{type(value).__name__}{'' if shape is None else f' {list(shape)}'}>"


def _places(error: Exception) -> list[str]:
    frames = traceback.extract_tb(error.__traceback__)
    return [f"{frame.filename.rsplit('/', 1)[-1]}, line {frame.lineno}, in {frame.name}" for frame in frames]


def _unheard(_value: float, _of: float, _preview: Any) -> None:
    """Nobody listens while signatures are made."""


def _now() -> int:
    return int(time.time() * 1000)
