"""Servers that run workflows for real, without the engine's batcher and without loading a model first."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

from starlette.testclient import TestClient

from octavo.server.comfy.socket import Clients
from octavo.server.state import State, Works
from tests.server.conftest import until


def graph_load(state: State) -> Works:
    """Works whose "graph" jobs are ComfyUI workflows."""
    from octavo.graph.nodes import NODES
    from octavo.graph.runner import Workshop, graph_runner
    from octavo.pipeline.shelf import LoadSettings, Shelf

    settings = state.settings
    shelf = Shelf(LoadSettings(models_dir=settings.models_dir, device="cpu"))
    device = threading.RLock()

    def one_at_a_time(work: Callable[[], Any]) -> Any:
        with device:
            return work()

    workshop = Workshop(
        shelf=shelf,
        input_dir=settings.inputs,
        output_dir=settings.output_dir,
        temp_dir=settings.temp_dir,
        on_device=one_at_a_time,
    )
    return Works(
        shelf=shelf,
        batcher=None,
        nodes=NODES,
        workshop=workshop,
        runners={"graph": graph_runner(workshop, preview_interval=0, preview_share=1.0)},  # each step is shown
        warm_up=lambda: None,
        close=lambda: None,
    )


def state_of(server: TestClient) -> State:
    """What a server in memory holds."""
    state: State = server.app.state.octavo  # type: ignore[attr-defined]
    return state


def clients_of(server: TestClient) -> Clients:
    """Who listens to a server in memory."""
    clients: Clients = server.app.state.comfy.clients  # type: ignore[attr-defined]
    return clients


def ready(server: TestClient) -> TestClient:
    """The server, once it is up."""
    until(lambda: state_of(server).is_ready, "the server is ready")
    return server


def until_idle(server: TestClient) -> None:
    """Wait until nothing is queued or runs."""
    until(lambda: sum(state_of(server).queue.depth().values()) == 0, "the queue is empty")


def image_prompt(prefix: str = "picture", colour: int = 255, size: int = 16) -> dict[str, Any]:
    """A workflow that needs no model: a picture of one colour, saved."""
    inputs = {"width": size, "height": size, "batch_size": 1, "color": colour}
    return {
        "1": {"class_type": "EmptyImage", "inputs": inputs},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": prefix}},
    }


def messages(socket: Any, last: str = "executing") -> Iterator[dict[str, Any]]:
    """JSON messages of a websocket of the test client, up to the one that says that a prompt is over."""
    while True:
        message = socket.receive_json()
        yield message
        if message["type"] == last and message["data"].get("node", 0) is None:
            return
