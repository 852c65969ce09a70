"""From a prompt to the record that ComfyUI's history holds: checked, run, told.

`run_prompt` is for one who is alone with the device, such as `octavo run`; `graph_runner` makes of it what the engine
calls for each job of the kind "graph".
"""

import io
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from octavo.devices import compute_on_one_core
from octavo.errors import JobError, RequestError
from octavo.graph.cache import Cache
from octavo.graph.context import Context, at_once
from octavo.graph.execute import Emit, Executor
from octavo.graph.lists import FileLists
from octavo.graph.nodes import NODES
from octavo.graph.places import inside
from octavo.graph.spec import NodeSpec
from octavo.graph.workflow import Workflow, validate
from octavo.pipeline.pace import SHARE, Pace
from octavo.pipeline.run import Solve, solve
from octavo.pipeline.speed import EXACT, Speed

if TYPE_CHECKING:
    from PIL.Image import Image

    from octavo.pipeline.shelf import Shelf

Record = dict[str, Any]

IN_HISTORY = ("execution_start", "execution_cached", "execution_success", "execution_error", "execution_interrupted")
LARGEST_PREVIEW = 512  # pixels a side, as ComfyUI's
PREVIEW_INTERVAL = 0.1  # seconds between previews of one job at least; a browser shows no more


@dataclass(frozen=True, kw_only=True)
class Workshop:
    """What all workflows of one process share."""

    shelf: "Shelf"
    input_dir: Path
    output_dir: Path
    temp_dir: Path
    solve: Solve = solve  # of the engine's batcher, where there is one
    on_device: Callable[[Callable[[], Any]], Any] = at_once  # likewise
    nodes: Mapping[str, NodeSpec] = field(default_factory=lambda: NODES)
    cache: Cache = field(default_factory=Cache)
    max_pixels: int = 16384 * 16384  # of a picture to draw
    speed: Speed = EXACT  # of all runs: no node says it

    @property
    def lists(self) -> FileLists:
        """What there is to choose from now."""
        return FileLists(shelf=self.shelf, input_dir=self.input_dir, output_dir=self.output_dir, temp_dir=self.temp_dir)

    def validate(self, prompt: Any, targets: Sequence[str] | None = None) -> Workflow:
        """`workflow.validate` with the nodes and files of this place."""
        return validate(prompt, self.nodes, self.lists, targets=targets)

    def still_there(self, ui: Mapping[str, Any]) -> bool:
        """Whether every file that a node showed is where it was saved."""
        folders = {"output": self.output_dir, "temp": self.temp_dir, "input": self.input_dir}
        for shown in (item for items in ui.values() for item in items if isinstance(item, Mapping)):
            if shown.get("type") not in folders or "filename" not in shown:
                continue
            try:
                path = inside(folders[shown["type"]], f"{shown.get('subfolder', '')}/{shown['filename']}".lstrip("/"))
            except RequestError:
                return False
            if not path.is_file():
                return False
        return True


def run_prompt(
    workshop: Workshop,
    workflow: Workflow,
    tell: Emit,
    *,
    prompt_id: str = "",
    extra_pnginfo: Mapping[str, Any] | None = None,
    check: Callable[[], None] = lambda: None,
    note_file: Callable[[Path], None] = lambda _path: None,
) -> Record:
    """Run a checked workflow.

    Args:
        tell: is told all that `Executor.run` emits.
        prompt_id: repeated in every message.
        extra_pnginfo: what saved pictures keep beside the prompt.
        check: raises when the run is to end; asked between nodes and steps.
        note_file: told of every file before it appears.

    Returns:
        {"outputs": what each node showed, "meta": {…}, "status": {"status_str", "completed", "messages"}}, as an entry
        of ComfyUI's `/history` has them.

    Raises:
        JobError: a node failed, or what `check` raised; its `result` is the record up to there.
    """
    messages: list[list[Any]] = []

    def keep(type: str, data: dict[str, Any]) -> None:
        if type in IN_HISTORY:
            messages.append([type, data])
        tell(type, data)

    context = Context(
        shelf=workshop.shelf,
        solve=workshop.solve,
        on_device=workshop.on_device,
        input_dir=workshop.input_dir,
        output_dir=workshop.output_dir,
        temp_dir=workshop.temp_dir,
        check=check,
        note_file=note_file,
        prompt=workflow.prompt,
        extra_pnginfo=extra_pnginfo or {},
        max_pixels=workshop.max_pixels,
        speed=workshop.speed,
    )
    executor = Executor(workshop.cache, still_there=workshop.still_there)
    try:
        # Whatever nodes compute in this thread; the device's own thread sees to itself.
        with torch.inference_mode():
            outputs = executor.run(workflow, context, keep, prompt_id=prompt_id)
    except JobError as error:
        error.result = _record({}, messages, completed=False)
        raise
    return _record(outputs, messages, completed=True)


def _record(outputs: dict[str, Any], messages: list[list[Any]], *, completed: bool) -> Record:
    meta = {id: {"node_id": id, "display_node": id, "parent_node": None, "real_node_id": id} for id in outputs}
    status = {"status_str": "success" if completed else "error", "completed": completed, "messages": messages}
    return {"outputs": outputs, "meta": meta, "status": status}


class _Job(Protocol):
    """A stored request."""

    @property
    def id(self) -> str: ...
    @property
    def payload(self) -> Mapping[str, Any]: ...


class Task(Protocol):
    """A job in the hands of its runner; the engine's `Task` is one."""

    @property
    def job(self) -> _Job: ...

    def emit(self, type: str, data: dict[str, Any] | None = None, binary: bytes | None = None) -> None:
        """Tell all who listen."""
        ...

    def check(self) -> None:
        """Raise if the job is to end."""
        ...

    def note_file(self, path: Path) -> None:
        """Tell of a file before it appears."""
        ...


def graph_runner(
    workshop: Workshop,
    *,
    preview_interval: float = PREVIEW_INTERVAL,
    preview_share: float = SHARE,
    watched: Callable[[str], bool] = lambda _job: True,
) -> Callable[[Task], Record]:
    """The runner of jobs of the kind "graph".

    A job's payload is {"prompt": the workflow in the API format, "extra_data": {…}, "client_id": str or None,
    "targets": ids of output nodes or None}. It emits ComfyUI's messages as "comfy" {"type", "data"}, previews as
    "preview" with a picture, in the order recorded from ComfyUI, and "stage" and "progress" as all runners do. Previews
    are made for those who gave a client id and did not set the `preview_method` "none", while `watched` says of the
    job's id that somebody would see them; those of all jobs together take no more than `preview_share` of the time.
    """
    pace = Pace(preview_share)

    def run(task: Task) -> Record:
        compute_on_one_core()
        payload = task.job.payload
        extra_data = payload.get("extra_data")
        extra_data = extra_data if isinstance(extra_data, Mapping) else {}
        pnginfo = extra_data.get("extra_pnginfo")
        workflow = workshop.validate(payload.get("prompt"), payload.get("targets"))
        wanted = payload.get("client_id") is not None and extra_data.get("preview_method") != "none"
        return run_prompt(
            workshop,
            workflow,
            _Teller(task, workflow, preview_interval if wanted else None, pace, watched),
            prompt_id=task.job.id,
            extra_pnginfo=pnginfo if isinstance(pnginfo, Mapping) else {},
            check=task.check,
            note_file=task.note_file,
        )

    return run


class _Teller:
    """Passes messages on to those who follow a job."""

    def __init__(
        self,
        task: Task,
        workflow: Workflow,
        preview_interval: float | None,
        pace: Pace,
        watched: Callable[[str], bool],
    ) -> None:
        self._task, self._workflow, self._pace, self._watched = task, workflow, pace, watched
        self._interval, self._last = preview_interval, float("-inf")

    def __call__(self, type: str, data: dict[str, Any]) -> None:
        if type == "preview":
            self._preview(data)
            return
        self._task.emit("comfy", {"type": type, "data": data})
        if type == "executing":
            self._task.emit("stage", {"stage": self._workflow.nodes[data["node"]].title})
        elif type == "progress":
            self._task.emit("progress", {"value": data["value"], "max": data["max"]})

    def _preview(self, data: dict[str, Any]) -> None:
        image = data.pop("image")
        now = time.monotonic()
        # A picture that is the result itself comes as PNG, and is nobody's to leave out.
        final = getattr(image, "format", None) == "PNG"
        if not final and (
            self._interval is None or now - self._last < self._interval or not self._watched(self._task.job.id)
        ):
            return
        picture: Image | None = self._pace(image) if callable(image) else image
        if picture is None:
            return
        self._last = now
        kind, binary = encoded(picture)
        size = {"width": picture.width, "height": picture.height}
        self._task.emit("preview", {**data, **size, "image_type": kind}, binary)


def encoded(picture: "Image") -> tuple[str, bytes]:
    """A preview as a file: its type and bytes. A PNG is a result and stays as it is; all else becomes a small JPEG."""
    file = io.BytesIO()
    if picture.format == "PNG":
        picture.save(file, "PNG", compress_level=1)
        return "image/png", file.getvalue()
    small = picture.convert("RGB")
    small.thumbnail((LARGEST_PREVIEW, LARGEST_PREVIEW))
    small.save(file, "JPEG", quality=90)
    return "image/jpeg", file.getvalue()
