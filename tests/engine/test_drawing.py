"""Jobs of the kind "generate": the pictures of `octavo generate`, with their files, events and ends."""

import io
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from PIL import Image, ImageChops

from octavo import GenerateRequest, generate
from octavo.engine import drawing as drawing_module
from octavo.engine.batch import Batcher
from octavo.engine.drawing import drawing
from octavo.engine.events import Task
from octavo.engine.metrics import Metrics
from octavo.engine.queue import Queue
from octavo.engine.service import Service
from octavo.errors import JobCancelledError, JobError, ModelNotFoundError, NumericsError, RequestError
from octavo.pipeline.generate import prepare, start
from octavo.pipeline.hires import Hires
from octavo.pipeline.image import read_settings
from octavo.pipeline.request import resolve
from octavo.pipeline.run import solve
from octavo.pipeline.shelf import LoadSettings, Shelf

REQUEST = GenerateRequest(prompt="a large red star on a blue background", width=64, height=64, steps=4, seed=5)

Runner = Callable[[Any], dict[str, Any]]


class FakeTask:
    """A task without a service: keeps what it is told."""

    def __init__(self, payload: dict[str, Any]) -> None:
        self.job = SimpleNamespace(id="a-job", payload=payload)
        self.events: list[tuple[str, dict[str, Any], bytes | None]] = []
        self.notes: list[tuple[str, bool]] = []  # name, and whether the file was there already
        self.taken: set[str] = set()  # names that another job has
        self.stop_at: int | None = None  # cancelled when so many steps have been told of
        self._lock = threading.Lock()

    def emit(self, type: str, data: dict[str, Any], binary: bytes | None = None) -> None:
        with self._lock:
            self.events.append((type, data, binary))

    def check(self) -> None:
        if self.stop_at is not None and self.value >= self.stop_at:
            raise JobCancelledError("It was cancelled.")

    def note_file(self, path: Path) -> None:
        if path.name in self.taken:
            raise FileExistsError(path)
        self.notes.append((path.name, path.exists()))

    @property
    def value(self) -> int:
        """Steps that were told of."""
        return max((data["value"] for type, data, _ in self.events if type == "progress"), default=0)

    def types(self) -> list[str]:
        """Of events, in order, repetitions left out."""
        types = [type if type != "stage" else data["stage"] for type, data, _ in self.events]
        return [type for i, type in enumerate(types) if i == 0 or types[i - 1] != type]


@pytest.fixture(scope="module")
def shelf() -> Shelf:
    return Shelf(LoadSettings(device="cpu"))


@pytest.fixture(scope="module")
def batcher() -> Iterator[Batcher]:
    made = Batcher()
    yield made
    made.close()


@pytest.fixture
def runner(shelf: Shelf, batcher: Batcher, tmp_path: Path) -> Runner:
    return cast(Runner, drawing(shelf, batcher, tmp_path / "output"))


def task_of(request: GenerateRequest, **more: Any) -> FakeTask:
    return FakeTask({"request": json.loads(json.dumps(request.settings)), "preview_every": 0, **more})


def pixels(path: Path) -> bytes:
    with Image.open(path) as image:
        return image.convert("RGB").tobytes()


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "dpmpp_sde", "euler_cfg_pp"])
def test_a_job_alone_draws_the_very_picture_of_generate(
    runner: Runner, shelf: Shelf, tmp_path: Path, sampler: str
) -> None:
    request = replace(REQUEST, sampler=sampler)
    (expected,) = generate(shelf.components(None), request)
    result = runner(task_of(request))
    (made,) = result["pictures"]
    path = tmp_path / "output" / made["path"]
    assert pixels(path) == expected.image.tobytes()
    assert made["settings"] == expected.settings == read_settings(path)
    assert result["seconds"] >= 0


def test_in_company_a_picture_is_the_same_within_a_level(
    runner: Runner, shelf: Shelf, batcher: Batcher, tmp_path: Path
) -> None:
    """Six jobs of other samplers, steps, seeds and prompts at once, against each of them alone.

    Tolerance: one level of 255, and 1e-3 of the latents, whose deviation is 1. Rows of a batch do not mix, but a matrix
    product of more rows may be rounded in another order. Where this was measured (float32 on a CPU with AVX-512) both
    were equal bit for bit.
    """
    samplers = ["euler", "heun", "dpmpp_2m", "dpmpp_2m_sde", "euler_ancestral", "uni_pc"]
    prompts = ["a red star", "a small blue circle on a white background"]
    requests = [
        replace(REQUEST, sampler=sampler, steps=4 + i, seed=i, prompt=prompts[i % 2])
        for i, sampler in enumerate(samplers)
    ]
    components = shelf.components(None)
    alone = [generate(components, request)[0].image for request in requests]
    jobs = [resolve(request, components.preset, model="", max_side=components.max_side) for request in requests]
    runs = [start(components, job, prepare(components, job)) for job in jobs]
    with ThreadPoolExecutor(len(requests)) as pool:
        results = list(pool.map(runner, map(task_of, requests)))
        latents = list(pool.map(lambda run: batcher.solve(run, lambda _: None), runs))
    for run, made in zip(runs, latents, strict=True):
        assert (solve(run, lambda _: None) - made).abs().max() <= 1e-3
    for result, expected in zip(results, alone, strict=True):
        with Image.open(tmp_path / "output" / result["pictures"][0]["path"]) as image:
            worst = max(high for _, high in ImageChops.difference(image.convert("RGB"), expected).getextrema())
        assert worst <= 1


def test_second_passes_are_drawn_in_company_too(runner: Runner, shelf: Shelf, tmp_path: Path) -> None:
    """Alone the very picture of `generate`; beside others of both sizes the same within a level, as above."""
    again = [Hires(scale=2), Hires(scale=2, method="latent-bislerp", prompt="a blue star", steps=3), None]
    requests = [
        replace(REQUEST, seed=seed, hires=hires, width=64 if hires else 128, height=64 if hires else 128)
        for seed, hires in enumerate(again)
    ]
    alone = [generate(shelf.components(None), request)[0] for request in requests]
    task = task_of(requests[0])
    made = runner(task)["pictures"][0]
    assert pixels(tmp_path / "output" / made["path"]) == alone[0].image.tobytes()
    assert made["settings"] == alone[0].settings
    assert task.types() == ["encode", "denoise", "progress", "decode"]
    steps = [data for type, data, _ in task.events if type == "progress"]
    assert [data["value"] for data in steps] == [0, 1, 2, 3, 4, 4, 5, 6, 7, 8]
    assert {data["max"] for data in steps} == {8}
    with ThreadPoolExecutor(len(requests)) as pool:
        results = list(pool.map(runner, map(task_of, requests)))
    for result, expected in zip(results, alone, strict=True):
        with Image.open(tmp_path / "output" / result["pictures"][0]["path"]) as image:
            assert image.size == (128, 128)
            worst = max(high for _, high in ImageChops.difference(image.convert("RGB"), expected.image).getextrema())
        assert worst <= 1


def test_a_job_is_cancelled_in_its_second_pass(runner: Runner) -> None:
    task = task_of(replace(REQUEST, hires=Hires(scale=2)))
    task.stop_at = 6
    with pytest.raises(JobCancelledError):
        runner(task)
    assert task.value == 6


def test_pictures_of_a_batch_are_drawn_at_once_and_named_in_the_order_of_their_seeds(
    runner: Runner, shelf: Shelf, tmp_path: Path
) -> None:
    task = task_of(replace(REQUEST, batch=3))
    result = runner(task)
    assert [made["path"] for made in result["pictures"]] == [f"octavo_{n:05}_.png" for n in (1, 2, 3)]
    assert [made["seed"] for made in result["pictures"]] == [5, 6, 7]
    expected = generate(shelf.components(None), replace(REQUEST, batch=3))
    for made, one in zip(result["pictures"], expected, strict=True):
        assert pixels(tmp_path / "output" / made["path"]) == one.image.tobytes()
        assert made["settings"]["batch"] == 1, "its settings make this one picture"
    told = [data for type, data, _ in task.events if type == "progress"]
    values = [data["value"] for data in told]
    assert values == sorted(values)
    assert told[-1] == {"value": 12, "max": 12}


def test_stages_and_steps_are_told_in_order(runner: Runner) -> None:
    task = task_of(REQUEST)
    runner(task)
    assert task.types() == ["encode", "denoise", "progress", "decode"]
    values = [(data["value"], data["max"]) for type, data, _ in task.events if type == "progress"]
    assert values == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]


def test_every_name_is_noted_before_its_file_appears(runner: Runner) -> None:
    task = task_of(replace(REQUEST, batch=2))
    runner(task)
    assert not any(there for _, there in task.notes)
    names = [name for name, _ in task.notes]
    assert "octavo_00001_.png" in names
    assert sum(name.endswith(".part") for name in names) == 2


def test_numbers_go_on_from_what_is_there_and_pass_over_what_is_taken(
    shelf: Shelf, batcher: Batcher, tmp_path: Path
) -> None:
    (tmp_path / "octavo_00041_.png").touch()
    (tmp_path / "octavo_x_.png").touch()
    (tmp_path / "other_00099_.png").touch()
    runner = drawing(shelf, batcher, tmp_path)
    task = task_of(REQUEST, format="webp")
    task.taken = {"octavo_00042_.webp"}
    assert runner(cast(Task, task))["pictures"][0]["path"] == "octavo_00043_.webp"
    assert runner(cast(Task, task_of(REQUEST, prefix="other")))["pictures"][0]["path"] == "other_00100_.png"
    with Image.open(tmp_path / "octavo_00043_.webp") as image:
        assert image.format == "WEBP"


def test_previews_are_made_for_those_who_look(
    shelf: Shelf, batcher: Batcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drawing_module, "PREVIEW_SECONDS", 0.0)
    looking = drawing(shelf, batcher, tmp_path, preview_share=1.0)
    task = task_of(REQUEST, preview_every=2)
    looking(cast(Task, task))
    previews = [(data, binary) for type, data, binary in task.events if type == "preview"]
    assert len(previews) == 2, "of steps 2 and 4"
    for data, binary in previews:
        assert binary is not None
        with Image.open(io.BytesIO(binary)) as image:
            assert image.format == "JPEG"
            assert (image.width, image.height) == (data["width"], data["height"])
    asked: list[str] = []
    nobody = drawing(shelf, batcher, tmp_path, watched=lambda job: bool(asked.append(job)))
    task = task_of(REQUEST, preview_every=1)
    nobody(cast(Task, task))
    assert asked == ["a-job"] * 4
    assert "preview" not in task.types()


def test_previews_keep_their_distance(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing_module, "PREVIEW_SECONDS", 1000.0)
    task = task_of(REQUEST, preview_every=1)
    runner(task)
    assert "preview" not in task.types()


def test_a_cancelled_job_ends_at_its_next_step_and_its_pictures_with_it(runner: Runner, batcher: Batcher) -> None:
    task = task_of(replace(REQUEST, steps=500, batch=3))
    task.stop_at = 7
    with pytest.raises(JobCancelledError) as stopped:
        runner(task)
    assert stopped.value.result is not None
    assert stopped.value.result["pictures"] == []
    assert task.value < 7 + 3 * 3
    assert batcher.do(lambda: batcher.busy) == 0


def test_what_was_finished_before_a_failure_is_told(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = drawing_module.draw

    def draw(components: Any, job: Any, *rest: Any) -> Any:
        if job.seed == 7:
            raise NumericsError("The model gave NaN or infinity.")
        return plain(components, job, *rest)

    monkeypatch.setattr(drawing_module, "draw", draw)
    with pytest.raises(JobError, match=r"NaN or infinity\. 2 of 4 pictures") as failed:
        runner(task_of(replace(REQUEST, batch=4)))
    assert failed.value.result is not None
    assert [made["seed"] for made in failed.value.result["pictures"]] == [5, 6]
    with pytest.raises(NumericsError):
        runner(task_of(replace(REQUEST, seed=7)))


def test_a_picture_to_start_from_is_told_by_its_name_only(runner: Runner, tmp_path: Path) -> None:
    folder = tmp_path / "secret" / "uploads"
    folder.mkdir(parents=True)
    for name in ("start.png", "mask.png"):
        Image.new("RGB", (64, 64), "white").save(folder / name)
    request = replace(REQUEST, image=str(folder / "start.png"), mask=str(folder / "mask.png"), denoise=0.5)
    (made,) = runner(task_of(request))["pictures"]
    path = tmp_path / "output" / made["path"]
    assert (made["settings"]["image"], made["settings"]["mask"]) == ("start.png", "mask.png")
    assert b"secret" not in path.read_bytes()


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"request": None}, RequestError), ({"request": {"prompt": "x", "stepz": 1}}, RequestError),
        ({"request": {"prompt": "x", "sampler": "eular"}}, RequestError), ({"model": "no-such"}, ModelNotFoundError),
        ({"format": "gif"}, RequestError), ({"format": 3}, RequestError), ({"preview_every": -1}, RequestError),
        ({"preview_every": "often"}, RequestError), ({"prefix": "../up"}, RequestError),
        ({"prefix": "a/b"}, RequestError), ({"prefix": ".hidden"}, RequestError), ({"prefix": ""}, RequestError),
        ({"prefix": "x\n"}, RequestError),
    ],
)  # fmt: skip
def test_payloads_that_cannot_be_meant_are_refused(
    runner: Runner, tmp_path: Path, change: dict[str, Any], error: type[Exception]
) -> None:
    task = task_of(REQUEST)
    task.job.payload.update(change)
    with pytest.raises(error):
        runner(task)
    assert not (tmp_path / "output").exists() or not list((tmp_path / "output").iterdir())


def test_seconds_are_counted_by_stage(shelf: Shelf, tmp_path: Path) -> None:
    metrics = Metrics()
    batcher = Batcher(metrics=metrics)
    drawing(shelf, batcher, tmp_path, metrics=metrics)(cast(Task, task_of(replace(REQUEST, batch=2))))
    batcher.close()
    text = metrics.render().decode()
    for stage, count in (("encode", 1), ("denoise", 2), ("decode", 2)):
        assert f'octavo_stage_seconds_count{{stage="{stage}"}} {count}.0' in text


def test_the_service_runs_it(shelf: Shelf, batcher: Batcher, tmp_path: Path) -> None:
    """Queue, worker, batch and file, as in a server."""
    queue = Queue(tmp_path / "queue.sqlite3")
    service = Service(queue, {"generate": drawing(shelf, batcher, tmp_path / "output")}, workers=3)
    service.start()
    try:
        jobs = [
            service.submit("generate", {"request": replace(REQUEST, seed=seed).settings, "preview_every": 0})
            for seed in range(5)
        ]
        done = [service.wait(job.id, 60.0) for job in jobs]
        names = []
        for seed, stored in enumerate(done):
            assert stored is not None
            assert stored.state == "done", stored.error
            assert stored.result is not None
            names += [made["path"] for made in stored.result["pictures"]]
            (expected,) = generate(shelf.components(None), replace(REQUEST, seed=seed))
            assert pixels(tmp_path / "output" / names[-1]) == expected.image.tobytes()
        assert sorted(names) == [f"octavo_{n:05}_.png" for n in range(1, 6)]
        assert sorted(path.name for path in (tmp_path / "output").iterdir()) == sorted(names), (
            "and nothing else is left"
        )
    finally:
        service.stop(5.0)
        queue.close()
    assert not torch.is_inference_mode_enabled()
