"""What a node may use while it runs: models, the device, folders, and a way to tell how far it is."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from PIL.Image import Image

    from octavo.pipeline.run import Solve
    from octavo.pipeline.shelf import Shelf
    from octavo.pipeline.speed import Speed

T = TypeVar("T")
Report = Callable[[float, float, Any], None]


def at_once(work: Callable[[], T]) -> T:
    """The plain `on_device`: nobody else is there, so do it now."""
    return work()


def _nothing_to_check() -> None:
    """The plain `check`: nobody can cancel."""


def _forgotten(_path: Path) -> None:
    """The plain `note_file`: nobody keeps a list of files."""


def _unheard(_value: float, _of: float, _preview: Any) -> None:
    """The plain `report`: nobody listens."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """Everything that one run of a workflow lends to its nodes; each node gets it with its own `node_id`."""

    shelf: "Shelf"  # models by name, each loaded once
    solve: "Solve"  # walks a sampler to its end: the plain loop, or the engine's batch
    input_dir: Path
    output_dir: Path
    temp_dir: Path
    on_device: Callable[[Callable[[], Any]], Any] = at_once  # encode and decode inside `context.on_device(lambda: …)`
    check: Callable[[], None] = _nothing_to_check  # raises when the job was cancelled; call it between bits of work
    note_file: Callable[[Path], None] = _forgotten  # tell of an output file BEFORE it appears
    prompt: Mapping[str, Any] = field(default_factory=dict)  # the whole workflow in the API format
    extra_pnginfo: Mapping[str, Any] = field(default_factory=dict)  # what pictures keep beside it: the web's "workflow"
    metadata: bool = True  # whether saved pictures carry the two
    max_pixels: int = 16384 * 16384  # of a picture to draw; larger ones are refused
    speed: "Speed | None" = None  # of all runs; None for the exact one
    node_id: str = ""
    report: Report = _unheard  # how `progress` is told; use `progress`

    def progress(self, value: float, max: float, preview: "Image | Callable[[], Image] | None" = None) -> None:
        """Tell that `value` of `max` steps are done (`max` 0: unknown), with a picture of what is there so far.

        Args:
            preview: a small picture, or a function that makes one, called only if somebody looks.

        Raises:
            Whatever `check` raises when the job was cancelled.
        """
        self.check()
        self.report(value, max, preview)

    def for_node(self, node_id: str, report: Report) -> "Context":
        """The same context in the hands of one node."""
        return replace(self, node_id=node_id, report=report)
