"""Servers for tests: in memory or listening, with runners that draw at once or with the embedded model."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from starlette.testclient import TestClient

from octavo.engine.events import Task
from octavo.pipeline.image import Picture
from octavo.pipeline.request import GenerateRequest
from octavo.pipeline.shelf import LoadSettings, Shelf
from octavo.server.app import create_app
from octavo.server.run import Server, bind
from octavo.server.settings import Settings
from octavo.server.state import Load, State, Works

PATIENCE = 30.0  # seconds until a test gives up waiting


def draw_at_once(task: Task, output_dir: Path) -> dict[str, Any]:
    """What the engine's runner of kind "generate" does, without a model: plain pictures whose colour is their seed.

    A prompt "slow N" takes N steps of 20 ms; "fail" fails by a fault of ours.
    """
    request = GenerateRequest.from_settings(task.job.payload["request"])
    if request.prompt == "fail":
        raise ZeroDivisionError("the secret inside")
    steps = int(request.prompt.split()[1]) if request.prompt.startswith("slow ") else request.steps or 2
    seed = 1234 if request.seed is None else request.seed
    width, height = request.width or 64, request.height or 64
    size = width, height
    if request.hires is not None:
        size = request.hires.size(width, height)
        request = replace(request, hires=replace(request.hires, scale=None, width=size[0], height=size[1]))
    pictures = []
    for number in range(request.batch):
        image = Image.new("RGB", size, ((seed + number) % 256, number, 77))
        for step in range(steps):
            task.check()
            task.emit("progress", {"value": step + 1, "max": steps})
            task.emit("preview", {"width": 8, "height": 8}, jpeg(image.resize((8, 8))))
            if request.prompt.startswith("slow "):
                time.sleep(0.02)
        filled = {
            "width": width, "height": height, "steps": steps, "guidance_scale": request.guidance_scale or 4.0,
            "sampler": request.sampler or "euler", "schedule": request.schedule or "simple", "seed": seed + number,
            "model": "octavo-demo", "batch": 1,
        }  # fmt: skip
        settings = request.settings | filled
        name = f"octavo-{task.job.seq:05}-{number}.{task.job.payload['format']}"
        task.note_file(output_dir / name)
        Picture(image, settings).save(output_dir / name)
        pictures.append({"path": name, "seed": seed + number, "settings": settings})
    return {"pictures": pictures, "seconds": 0.01}


def jpeg(image: Image.Image) -> bytes:
    from io import BytesIO

    buffer = BytesIO()
    image.save(buffer, "JPEG")
    return buffer.getvalue()


def fake_load(state: State) -> Works:
    """Works without a model: everything is there at once, and "generate" is `draw_at_once`."""
    settings = state.settings
    from octavo.graph.nodes import NODES

    def graph(_task: Task) -> Mapping[str, Any]:
        raise NotImplementedError

    return Works(
        shelf=Shelf(LoadSettings(models_dir=settings.models_dir or settings.data_dir / "models", device="cpu")),
        batcher=None,
        nodes=NODES,
        workshop=None,
        runners={"generate": lambda task: draw_at_once(task, settings.output_dir), "graph": graph},
        warm_up=lambda: None,
        close=lambda: None,
    )


def settings_in(folder: Path, **more: Any) -> Settings:
    """Settings of a server whose files are all in `folder`."""
    places = {"data_dir": folder / "data", "output_dir": folder / "output", "models_dir": folder / "models"}
    return Settings(**{"workers": 2, "port": 0, **places, **more})


MakeServer = Callable[..., TestClient]


@pytest.fixture
def make_server(tmp_path: Path) -> Iterator[MakeServer]:
    """Makes servers in memory, without a socket: `make_server(api_keys=("…",))`; `load=` for other works."""
    opened: list[TestClient] = []

    def make(*, load: Load = fake_load, **more: Any) -> TestClient:
        settings = settings_in(tmp_path / str(len(opened)), **more)
        client = TestClient(create_app(settings, State(settings, load=load)), base_url="http://127.0.0.1:8188")
        client.__enter__()
        opened.append(client)
        return client

    yield make
    for client in opened:
        client.__exit__(None, None, None)


@pytest.fixture
def server(make_server: MakeServer) -> TestClient:
    """A server in memory that draws at once."""
    return make_server()


@dataclass(frozen=True)
class Live:
    """A server that listens."""

    url: str  # http://127.0.0.1:port
    port: int
    state: State
    settings: Settings


@contextmanager
def listening(settings: Settings, load: Load | None = fake_load) -> Iterator[Live]:
    """A real uvicorn on a free port, in a thread; `load=None` for the real engine."""
    server = Server(settings, load=load)
    door = bind(settings)
    thread = threading.Thread(target=lambda: server.run(sockets=[door]), daemon=True)
    thread.start()
    try:
        until(lambda: server.started, "the server answers")
        port = door.getsockname()[1]
        yield Live(f"http://127.0.0.1:{port}", port, server.state, settings)
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
        door.close()
        assert not thread.is_alive(), "the server does not stop"


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Live]:
    """A listening server that draws at once."""
    with listening(settings_in(tmp_path)) as running:
        yield running


@pytest.fixture(scope="session")
def live_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A listening server with the embedded model, shared by all tests of the session."""
    folder = tmp_path_factory.mktemp("server")
    with listening(settings_in(folder, loading={"device": "cpu"}), load=None) as running:
        until(lambda: running.state.is_ready or running.state.problem is not None, "the model is loaded")
        assert running.state.problem is None, running.state.problem
        yield running


def until(true: Callable[[], bool], what: str, seconds: float = PATIENCE) -> None:
    """Wait until something is so."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"waited {seconds} s in vain until {what}"
        time.sleep(0.01)
