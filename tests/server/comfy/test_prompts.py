"""Prompts on their way in, through the queue and into the history, as recorded of ComfyUI."""

from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.server.comfy.exchanges import differences, exchanges, send
from tests.server.comfy.servers import graph_load, state_of, until_idle
from tests.server.conftest import MakeServer, until

# Where we differ, and why.
ON_PURPOSE = {
    "invalid json": "400 with a reason, not 500",
    "history offset": "a picture that was kept is listed for clients without a websocket, too",
}


@pytest.fixture
def graphs(make_server: MakeServer) -> TestClient:
    """A server that runs workflows one after the other."""
    return make_server(load=graph_load, workers=1)


def test_prompts_are_checked_and_told_of_as_recorded(graphs: TestClient) -> None:
    found = {}
    for exchange in exchanges("prompt_validation"):
        answer = send(graphs, exchange["request"])
        different = list(differences(exchange["response"], answer))
        if different and exchange["name"] not in ON_PURPOSE:
            found[exchange["name"]] = different
        assert answer.status_code < 500, exchange["name"]
        until_idle(graphs)
    assert not found


def test_what_runs_is_told_of_as_recorded(graphs: TestClient) -> None:
    """`execution.json` from end to end: a run, the same again, one that fails, one that is stopped, a full queue."""
    recorded = exchanges("execution")
    entries = {each["name"]: only(each["response"]["json"]) for each in recorded if each["name"].startswith("history")}
    busy = next(each["response"]["json"] for each in recorded if each["name"].startswith("queue with"))
    before = {
        "history after t2i": lambda: post(graphs, entries["history after t2i"]["prompt"]),
        "history after cached": lambda: post(graphs, entries["history after cached"]["prompt"]),
        "history after error": lambda: post(graphs, entries["history after error"]["prompt"]),
        "interrupt": lambda: post(graphs, entries["history after interrupt"]["prompt"], wait="running"),
        "queue with 1 running 3 pending": lambda: [
            post(graphs, item, wait="running" if item in busy["queue_running"] else None)
            for item in (*busy["queue_running"], *sorted(busy["queue_pending"], key=lambda item: abs(item[0])))
        ],
        "queue at rest": lambda: until_idle(graphs),
    }
    found = {}
    for exchange in recorded:
        before.get(exchange["name"], lambda: None)()
        answer = send(graphs, exchange["request"])
        if exchange["name"] == "interrupt":
            until_idle(graphs)
        found[exchange["name"]] = list(differences(exchange["response"], answer))
    # Ours are in the order of their turns; ComfyUI's heap is in none.
    assert {name: different for name, different in found.items() if different} == {}


def post(server: TestClient, item: list[Any], *, wait: str | None = "over") -> None:
    """Queue a recorded item of the queue or history under its id, and wait for it."""
    number, id, prompt, extra_data, _ = item
    body = {"prompt": prompt, "prompt_id": id, "front": number < 0, "client_id": extra_data.get("client_id")}
    assert server.post("/prompt", json=body).json()["prompt_id"] == id
    if wait == "over":
        until_idle(server)
    elif wait == "running":
        until(lambda: state_of(server).service.progress(id) is not None, "the prompt runs")


def only(of: dict[str, Any]) -> Any:
    """The one value of an object."""
    [value] = of.values()
    return value
