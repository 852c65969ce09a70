"""Requests for pictures, drawn in company: what the service runs for jobs of the kind "generate".

Payload: {"request": `GenerateRequest.settings`, "model": name or None for the server's own, "format": png, jpeg or
webp, "prefix": what the files are called, "preview_every": steps between previews, 0 for none, "refine": of what the
request is to draw a part anew, {"picture": path, "denoise", and the fields of `Refinement`}}; all but the request may
be left out.
Result: {"pictures": [{"path" within the output folder, "seed", "settings"; "refined": what was done to a part}],
"seconds"}. A job that is cancelled or fails midway has the pictures that were finished by then.

The work is `pipeline.generate`'s, stage by stage; here are only the files and the events. The pictures of one request
share the running batch as those of many do: each is the very one that it would be alone.
"""

import io
import json
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePath
from time import monotonic
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from octavo.checkpoint.presets import Preset
from octavo.devices import compute_on_one_core, whole_processor
from octavo.engine.batch import Batcher
from octavo.engine.events import Task
from octavo.engine.metrics import Metrics
from octavo.errors import JobError, OctavoError, RequestError
from octavo.pipeline.components import Components
from octavo.pipeline.encode import Conditioning, TextEncoders
from octavo.pipeline.generate import Progress, draw, prepare_each
from octavo.pipeline.image import Picture, part_of
from octavo.pipeline.pace import SHARE, Pace
from octavo.pipeline.refine import DENOISE, NOTE, Part, Refinement, refining
from octavo.pipeline.request import GenerateRequest, resolve
from octavo.pipeline.shelf import Shelf

AT_ONCE = 16  # pictures of one request under way; each needs a thread that waits
PREVIEW_SECONDS = 0.3  # between previews of one job
FORMATS = {"png": ".png", "jpeg": ".jpg", "jpg": ".jpg", "webp": ".webp"}


def drawing(
    shelf: Shelf,
    batcher: Batcher,
    output_dir: Path,
    *,
    model: str | None = None,
    metrics: Metrics | None = None,
    watched: Callable[[str], bool] = lambda _job: True,
    preview_share: float = SHARE,
) -> Callable[[Task], dict[str, Any]]:
    """The runner for jobs of the kind "generate".

    Args:
        shelf: has the models.
        batcher: owns the device.
        output_dir: where the pictures go; made when needed.
        model: draws where a job names none; None for the embedded one.
        metrics: counts seconds by stage.
        watched: whether anyone wants previews of the job with this id.
        preview_share: the most of the time that the previews of all jobs together may take.
    """
    numbers, pace = _Numbers(output_dir), Pace(preview_share)

    def run(task: Task) -> dict[str, Any]:
        compute_on_one_core()
        start = monotonic()
        payload = task.job.payload
        files = _Files(task, numbers, payload.get("prefix", "octavo"), payload.get("format", "png"))
        components = shelf.components(payload.get("model") or model)
        with _part_of(payload, components.preset) as part:
            return draw_all(task, part, files, components, start)

    def draw_all(task: Task, part: Part, files: _Files, components: Components, start: float) -> dict[str, Any]:
        payload = task.job.payload
        job = resolve(part.request, components.preset, model=components.name, max_side=components.max_side)
        tell = _Teller(task, components, job.batch, _whole_number(payload, "preview_every", 1), watched, pace)

        def encode(encoders: TextEncoders, prompts: Sequence[str], clip_skip: int) -> list[Conditioning]:
            return shelf.encode_all(encoders, prompts, clip_skip=clip_skip)

        tell(Progress("encode", 0, job.batch))
        with _timed(metrics, "encode"):
            tracks = batcher.do(partial(prepare_each, components, job, encode=encode))

        def one(index: int) -> Picture:
            compute_on_one_core()
            decoding = 0.0

            def watch(progress: Progress) -> None:
                nonlocal decoding
                if progress.stage == "decode":
                    decoding = monotonic()
                tell(progress)

            single = replace(job, seed=job.seed + index, batch=1)
            picture = draw(components, single, tracks, watch, index, job.batch, batcher.solve, batcher.do)
            if metrics is not None:
                metrics.seconds("decode", monotonic() - decoding)
            return part.put_back(_without_paths(picture))

        done: list[dict[str, Any]] = []
        try:
            for picture in _in_order(one, job.batch, tell.stop):
                done.append(files.save(picture))
        except JobError as error:
            error.result = _result(done, start)
            raise
        except OctavoError as error:
            if not done:
                raise
            raise JobError(
                f"{error} {len(done)} of {job.batch} pictures were finished before.", result=_result(done, start)
            ) from error
        return _result(done, start)

    return run


def _in_order(one: Callable[[int], Picture], count: int, stop: Callable[[], None]) -> Iterator[Picture]:
    """Pictures 0, 1, … in this order, drawn at once; if one fails or the reader leaves, `stop` makes the others end."""
    if count == 1:
        yield one(0)
        return
    with ThreadPoolExecutor(min(count, AT_ONCE), thread_name_prefix="octavo-picture") as pool:
        try:
            futures: Sequence[Future[Picture]] = [pool.submit(one, index) for index in range(count)]
            for future in futures:
                yield future.result()
        finally:
            stop()
            pool.shutdown(wait=False, cancel_futures=True)


class _Stopped(Exception):  # noqa: N818  # nobody sees it but the pictures that end by it
    """Another picture of the same job has failed."""


class _Teller:
    """Tells the task how its pictures come along, and ends them where the job is to stop. Called from many threads."""

    def __init__(
        self,
        task: Task,
        components: Components,
        pictures: int,
        preview_every: int,
        watched: Callable[[str], bool],
        pace: Pace,
    ) -> None:
        self._task, self._components = task, components
        self._every, self._watched, self._pace = preview_every, watched, pace
        self._lock = threading.Lock()
        self._steps = [0] * pictures
        self._stage = ""
        self._stopped = False
        self._previewed = monotonic()

    def __call__(self, progress: Progress) -> None:
        self._task.check()
        if self._stopped:
            raise _Stopped
        with self._lock:
            # The pictures of a job go through their stages side by side; told is the furthest.
            if progress.stage != self._stage and not (progress.stage == "denoise" and self._stage == "decode"):
                self._stage = progress.stage
                self._task.emit("stage", {"stage": progress.stage})
            if progress.stage == "denoise":
                self._steps[progress.picture] = progress.step
                self._task.emit("progress", {"value": sum(self._steps), "max": progress.steps * len(self._steps)})
        self._show(progress)

    def stop(self) -> None:
        """End the pictures that are still under way."""
        self._stopped = True

    def _show(self, progress: Progress) -> None:
        """A preview, if it is time for one and somebody looks."""
        denoised, now = progress.denoised, monotonic()
        if denoised is None or not self._every or progress.step % self._every:
            return
        if now - self._previewed < PREVIEW_SECONDS or not self._watched(self._task.job.id):
            return
        image = self._pace(lambda: _look(self._components, denoised))
        if image is not None:
            self._previewed = now
            self._task.emit(
                "preview", {"width": image.width, "height": image.height, "picture": progress.picture}, _jpeg(image)
            )


class _Numbers:
    """The numbers of the files in a folder, by their prefix. Any thread may ask."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._last: dict[str, int] = {}

    def next(self, prefix: str) -> int:
        """One more than what was given last, at first than the largest in the folder."""
        with self._lock:
            if prefix not in self._last:
                self.folder.mkdir(parents=True, exist_ok=True)
                numbered = re.compile(rf"{re.escape(prefix)}_(\d{{1,15}})_\..*")
                found = (numbered.fullmatch(name) for name in os.listdir(self.folder))
                self._last[prefix] = max((int(match[1]) for match in found if match), default=0)
            self._last[prefix] += 1
            return self._last[prefix]


class _Files:
    """The output files of one job: `prefix_00001_.png` and on, as ComfyUI names them."""

    def __init__(self, task: Task, numbers: _Numbers, prefix: object, form: object) -> None:
        if not isinstance(prefix, str) or not re.fullmatch(r"\w[\w .()+-]{0,99}", prefix):
            raise RequestError(
                f"prefix {prefix!r:.120}: need a name for files of letters and digits, without a folder."
            )
        if not isinstance(form, str) or form.lower() not in FORMATS:
            raise RequestError(f"format {form!r:.120}: use {', '.join(FORMATS)}.")
        self._task, self._numbers, self._prefix, self._suffix = task, numbers, prefix, FORMATS[form.lower()]

    def save(self, picture: Picture) -> dict[str, Any]:
        """Write a picture under the next free number; returns what the result says of it."""
        try:
            path = self._free_name()
            self._task.note_file(part_of(path))
            picture.save(path)
        except (OSError, RequestError) as error:
            # Names and folder are the server's own: what went wrong is not the client's to mend, nor its place to know.
            reason = error if isinstance(error, OSError) else error.__cause__
            why = getattr(reason, "strerror", None) or "it refuses"
            raise JobError(
                f"The picture cannot be written to the output folder ({why}). The server's owner should look whether "
                "the folder is there and the disk has room."
            ) from error
        refined = json.loads(picture.notes[NOTE]) if NOTE in picture.notes else []
        # A picture that was refined may be from anywhere, and then tells of its part alone.
        settings = picture.settings or refined[-1]["request"]
        told = {"path": path.name, "seed": settings["seed"], "settings": settings}
        return told | ({"refined": refined} if refined else {})

    def _free_name(self) -> Path:
        """A name that from now on is this job's alone, among all jobs of the queue."""
        while True:
            number = self._numbers.next(self._prefix)
            path = self._numbers.folder / f"{self._prefix}_{number:05}_{self._suffix}"
            try:
                self._task.note_file(path)
            except FileExistsError:
                continue
            return path


def _request(payload: Mapping[str, Any]) -> GenerateRequest:
    settings = payload.get("request")
    if not isinstance(settings, Mapping):
        raise RequestError("The job has no 'request': need the settings of a picture.")
    return GenerateRequest.from_settings(settings)


@contextmanager
def _part_of(payload: Mapping[str, Any], preset: Preset) -> Iterator[Part]:
    """What is to be drawn: the request as it is, or the part of a picture that it is to draw anew."""
    request, wish = _request(payload), payload.get("refine")
    if wish is None:
        yield Part(request, lambda picture: picture)
        return
    if not isinstance(wish, Mapping) or not isinstance(wish.get("picture"), str):
        raise RequestError("The job's 'refine' names no picture.")
    given = {name: wish[name] for name in Refinement.__dataclass_fields__ if wish.get(name) is not None}
    if "region" in given:
        given["region"] = tuple(given["region"])
    refinement = Refinement(**given)
    with refining(preset, wish["picture"], request, refinement, denoise=wish.get("denoise", DENOISE)) as part:
        yield part


def _whole_number(payload: Mapping[str, Any], name: str, default: int) -> int:
    value = payload.get(name, default)
    if not isinstance(value, int) or value < 0:
        raise RequestError(f"{name} {value!r}: need a whole number from 0 up.")
    return value


def _without_paths(picture: Picture) -> Picture:
    """Without the folders of this machine: what a picture tells of those it started from is their names."""
    names: dict[str, Any] = {
        key: PurePath(picture.settings[key]).name for key in ("image", "mask") if picture.settings.get(key)
    }
    if controls := picture.settings.get("controls"):
        names["controls"] = [control | {"image": PurePath(control["image"]).name} for control in controls]
    return replace(picture, settings=picture.settings | names)


def _result(pictures: list[dict[str, Any]], start: float) -> dict[str, Any]:
    return {"pictures": pictures, "seconds": round(monotonic() - start, 3)}


@contextmanager
def _timed(metrics: Metrics | None, stage: str) -> Iterator[None]:
    if metrics is None:
        yield
        return
    with metrics.time(stage):
        yield


@torch.inference_mode()
@whole_processor()
def _look(components: Components, denoised: Tensor) -> Image.Image:
    return components.preview(denoised[:1])


def _jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()
