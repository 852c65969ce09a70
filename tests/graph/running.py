"""Runs workflows of small nodes and keeps what was told."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from octavo.graph.cache import Cache
from octavo.graph.execute import Executor
from octavo.graph.spec import NodeSpec
from octavo.graph.workflow import validate
from tests.graph.compare import FixedLists

LISTS = FixedLists(checkpoints=["sd35_tiny.safetensors"], input=["example.png"])


def _calm() -> None:
    """Nobody cancels."""


@dataclass(frozen=True)
class Lent:
    """What toy nodes are lent."""

    check: Callable[[], None] = _calm
    saved: list[Any] = field(default_factory=list)
    ran: list[str] = field(default_factory=list)  # ids, in order
    report: Callable[[float, float, Any], None] = lambda *_: None
    node_id: str = ""

    def for_node(self, node_id: str, report: Callable[[float, float, Any], None]) -> "Lent":
        return replace(self, node_id=node_id, report=report)

    def progress(self, value: float, most: float, image: Any = None) -> None:
        self.check()
        self.report(value, most, image)


@dataclass
class Runs:
    """An executor with all that its runs told."""

    specs: Mapping[str, NodeSpec]
    cache: Cache = field(default_factory=Cache)
    told: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    still_there: Callable[[Mapping[str, Any]], bool] = lambda _ui: True

    def run(self, prompt: Mapping[str, Any], lent: Lent | None = None, targets: list[str] | None = None) -> Any:
        """What the outputs showed; `told` holds the messages of this run alone."""
        self.told = []
        workflow = validate(prompt, self.specs, LISTS, targets=targets)
        executor = Executor(self.cache, still_there=self.still_there)
        return executor.run(workflow, lent or Lent(), lambda *each: self.told.append(each), prompt_id="p")

    @property
    def executed(self) -> list[str]:
        """Ids of the nodes that were run, in order."""
        return [data["node"] for type, data in self.told if type == "executing"]

    @property
    def cached(self) -> list[str]:
        """Ids of the nodes that were said to be cached."""
        (nodes,) = [data["nodes"] for type, data in self.told if type == "execution_cached"]
        return list(nodes)
