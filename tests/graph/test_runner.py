"""A job of the kind "graph": what is told to those who follow it, and the record that remains."""

import io
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from octavo.errors import JobCancelledError
from octavo.graph.execute import NodeFailedError
from octavo.graph.lists import FileLists, pictures_in
from octavo.graph.runner import Workshop, encoded, graph_runner
from octavo.graph.spec import NodeResult
from octavo.graph.workflow import InvalidPrompt
from tests.graph.toys import IMAGE_PROMPT, TOYS


@dataclass
class Job:
    payload: dict[str, Any]
    id: str = "job"


@dataclass
class Task:
    """What the engine hands to a runner."""

    job: Job
    told: list[tuple[str, Any, bytes | None]] = field(default_factory=list)
    noted: list[Path] = field(default_factory=list)
    cancel_at: str | None = None

    def emit(self, type: str, data: Any = None, binary: bytes | None = None) -> None:
        self.told.append((type, data, binary))

    def check(self) -> None:
        if self.cancel_at in self.types:
            raise JobCancelledError("enough")

    def note_file(self, path: Path) -> None:
        self.noted.append(path)

    @property
    def types(self) -> list[str]:
        return [data["type"] if type == "comfy" else type for type, data, _ in self.told]


def _save(context: Any, images: Any, prefix: str) -> NodeResult:
    for step in (1, 2):
        context.progress(step, 2, lambda: Image.new("RGB", (1024, 512)))
    path = context.output_dir / f"{prefix}_{len(list(context.output_dir.iterdir()))}.txt"
    context.note_file(path)
    path.write_text(f"{images} {context.prompt['2']['class_type']} {context.extra_pnginfo}")
    return NodeResult(ui={"images": [{"filename": path.name, "subfolder": "", "type": "output"}]})


@pytest.fixture
def workshop(tmp_path):
    for name in ("input", "output", "temp"):
        (tmp_path / name).mkdir()
    return Workshop(
        shelf=None,  # type: ignore[arg-type]
        input_dir=tmp_path / "input",
        output_dir=tmp_path / "output",
        temp_dir=tmp_path / "temp",
        nodes={**TOYS, "SaveToy": replace(TOYS["SaveToy"], run=_save)},
    )


def _task(**payload: Any) -> Task:
    return Task(Job({"prompt": IMAGE_PROMPT, "client_id": "me", **payload}))


def test_a_job_is_told_and_recorded(workshop):
    task = _task(extra_data={"extra_pnginfo": {"workflow": "drawn"}})

    record = graph_runner(workshop, preview_interval=0, preview_share=1)(task)

    step = ["progress_state", "preview", "progress", "progress"]  # ComfyUI's and the engine's own
    node = ["progress_state", "executing", "stage"]
    assert task.types == [
        "execution_start", "execution_cached", *node, "progress_state", *node, *step, *step,
        "executed", "progress_state", "execution_success",
    ]  # fmt: skip
    shown = {"images": [{"filename": "img_0.txt", "subfolder": "", "type": "output"}]}
    assert record["outputs"] == {"2": shown}
    assert record["meta"] == {"2": {"node_id": "2", "display_node": "2", "parent_node": None, "real_node_id": "2"}}
    assert record["status"]["status_str"] == "success"
    assert record["status"]["completed"] is True
    messages = record["status"]["messages"]
    assert [type for type, _ in messages] == ["execution_start", "execution_cached", "execution_success"]
    assert all(data["prompt_id"] == "job" for _, data in messages)
    assert task.noted == [workshop.output_dir / "img_0.txt"]
    assert task.noted[0].read_text() == "(64, 64, 1, 255) SaveToy {'workflow': 'drawn'}"


def test_previews_are_small_pictures_with_their_node(workshop):
    task = _task()

    graph_runner(workshop, preview_interval=0, preview_share=1)(task)

    previews = [(data, binary) for type, data, binary in task.told if type == "preview"]
    assert [data for data, _ in previews] == 2 * [
        {
            "node_id": "2",
            "display_node_id": "2",
            "parent_node_id": None,
            "real_node_id": "2",
            "prompt_id": "job",
            "width": 1024,
            "height": 512,
            "image_type": "image/jpeg",
        }
    ]
    assert Image.open(io.BytesIO(previews[0][1] or b"")).size == (512, 256)


@pytest.mark.parametrize(
    "payload",
    [{"client_id": None}, {"extra_data": {"preview_method": "none"}}, {"extra_data": ["odd"], "client_id": None}],
)
def test_nobody_is_sent_previews_unasked(workshop, payload):
    task = _task(**payload)

    graph_runner(workshop, preview_interval=0, preview_share=1)(task)

    assert "preview" not in task.types
    assert task.types.count("progress") == 4


def test_previews_that_nobody_would_see_are_not_made(workshop):
    task, asked = _task(), []

    def watched(job):
        asked.append(job)
        return False

    graph_runner(workshop, preview_interval=0, preview_share=1, watched=watched)(task)

    assert "preview" not in task.types
    assert set(asked) == {task.job.id}


def test_previews_come_no_faster_than_they_can_be_seen(workshop):
    task = _task()

    graph_runner(workshop, preview_interval=60)(task)

    assert task.types.count("preview") == 1


def test_the_same_again_shows_the_same_files_while_they_are_there(workshop):
    run = graph_runner(workshop)
    first = run(_task())["outputs"]

    assert run(_task())["outputs"] == first
    (workshop.output_dir / "img_0.txt").unlink()
    again = _task()
    assert run(again)["outputs"] == first
    assert again.noted == [workshop.output_dir / "img_0.txt"]


@pytest.mark.parametrize(
    ("shown", "there"),
    [
        ({"filename": "a.png", "subfolder": "", "type": "output"}, True),
        ({"filename": "b.png", "subfolder": "sub", "type": "output"}, True),
        ({"filename": "b.png", "subfolder": "", "type": "output"}, False),
        ({"filename": "a.png", "subfolder": "", "type": "temp"}, False),
        ({"filename": "../a.png", "subfolder": "sub/..", "type": "output"}, False),
        ({"text": "no file"}, True),
    ],
)
def test_files_are_looked_for_where_they_were_saved(workshop, shown, there):
    (workshop.output_dir / "sub").mkdir()
    for name in ("a.png", "sub/b.png"):
        (workshop.output_dir / name).touch()

    assert workshop.still_there({"images": [shown], "text": ["x"]}) is there


def test_a_cancelled_job_leaves_its_record(workshop):
    task = _task()
    task.cancel_at = "progress"

    with pytest.raises(JobCancelledError) as cancelled:
        graph_runner(workshop)(task)

    assert task.types[-1] == "execution_interrupted"
    assert cancelled.value.result is not None
    assert cancelled.value.result["outputs"] == {}
    assert cancelled.value.result["status"]["status_str"] == "error"
    assert cancelled.value.result["status"]["messages"][-1][0] == "execution_interrupted"


def test_a_failed_job_leaves_its_record(workshop):
    def fail(_context: Any, **_: Any) -> tuple[Any]:
        raise ValueError("bad")

    broken = replace(workshop, nodes={**TOYS, "EmptyImage": replace(TOYS["EmptyImage"], run=fail)})
    with pytest.raises(NodeFailedError, match=r"Node 1 \(EmptyImage\): ValueError: bad") as failed:
        graph_runner(broken)(_task())

    assert failed.value.result is not None
    type, data = failed.value.result["status"]["messages"][-1]
    assert (type, data["exception_message"]) == ("execution_error", "bad")
    assert data == failed.value.details


def test_a_prompt_that_will_not_do_any_more_is_refused(workshop):
    with pytest.raises(InvalidPrompt):
        graph_runner(workshop)(_task(prompt={"1": {"class_type": "Gone"}}))


def test_a_png_is_passed_on_as_it_is():
    picture = Image.effect_noise((700, 600), 50).convert("RGB")
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    opened = Image.open(buffer)

    kind, binary = encoded(opened)

    assert kind == "image/png"
    assert Image.open(io.BytesIO(binary)).tobytes() == picture.tobytes()


def test_lists_offer_pictures_of_the_input_folder_and_nothing_of_unknown_kinds(tmp_path):
    for name in ("b.png", "a.JPG", "note.txt"):
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()

    assert pictures_in(tmp_path) == ["a.JPG", "b.png"]
    assert pictures_in(tmp_path / "nowhere") == []
    lists = FileLists(shelf=_NoShelf(), input_dir=tmp_path, output_dir=tmp_path, temp_dir=tmp_path)
    assert lists.names("input") == ["a.JPG", "b.png"]
    assert lists.names("upscale_models") == ()


class _NoShelf:
    def names(self, category: str) -> list[str]:
        from octavo.errors import RequestError

        raise RequestError(f"There is no folder of models '{category}'.")
