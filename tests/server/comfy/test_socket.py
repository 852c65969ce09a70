"""The websocket: ComfyUI's messages in ComfyUI's order, to whom they concern, and never a wait for who is slow."""

import asyncio
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from starlette.testclient import TestClient, WebSocketTestSession
from starlette.websockets import WebSocketDisconnect

from octavo.engine.events import Event
from octavo.server.app import create_app
from octavo.server.comfy.socket import (
    MOST,
    MOST_PASSING,
    MOST_PREVIEWS,
    TOO_SLOW,
    Clients,
    Outbox,
    Reader,
    Worth,
    _send,
)
from octavo.server.state import State
from tests.goldens import golden
from tests.server.comfy.exchanges import HOST, MODELS, shape_differences
from tests.server.comfy.servers import clients_of, graph_load, image_prompt, ready, state_of, until_idle
from tests.server.conftest import MakeServer, settings_in, until

RUNS = (
    "t2i_first_run",
    "t2i_all_cached",
    "t2i_new_seed",
    "t2i_preview_none",
    "image_only",
    "execution_error",
    "interrupted",
)
Message = dict[str, Any]


@pytest.fixture
def graphs(make_server: MakeServer) -> TestClient:
    """A server that runs workflows one after the other, and sends previews as ComfyUI does under --preview-method."""
    server = ready(make_server(load=graph_load, workers=1))
    clients_of(server).previews = "all"
    return server


def test_the_recorded_runs(graphs: TestClient) -> None:
    """Seven runs in order, for some find in the cache what others left; each message beside its recorded one."""
    text = golden("comfyui/api/websocket.json").read_text("utf-8")
    for theirs, ours in MODELS.items():
        text = text.replace(theirs, ours)
    recorded = json.loads(text)["runs"]
    assert set(recorded) == set(RUNS)
    for name in RUNS:
        run = recorded[name]
        if name == "execution_error":
            # ComfyUI keeps results of the latest prompt only, and that was another one.
            graphs.post("/free", json={"free_memory": True})
        flags = run["client_feature_flags"]
        with connect(graphs, run["request"]["client_id"]) as socket:
            greeting = [told(socket)]
            if flags is not None:
                socket.send_json({"type": "feature_flags", "data": flags})
                greeting.append(told(socket))
            assert alike([each["text"] for each in run["on_connect"]], greeting) == [], name
            answer = graphs.post("/prompt", json=run["request"]).json()
            assert not list(shape_differences(run["response"], answer, ""))
            given = list(whole_run(socket, graphs if name == "interrupted" else None))
        until_idle(graphs)
        messages = [each.get("text") or {"type": "binary", "data": without(each["binary"])} for each in run["messages"]]
        assert [line(each) for each in steps_once(given)] == [line(each) for each in steps_once(messages)], name
        assert alike(steps_once(messages), steps_once(given)) == [], name


def connect(server: TestClient, client: str) -> WebSocketTestSession:
    return server.websocket_connect(f"ws://127.0.0.1:8188/ws?clientId={client}")


def whole_run(socket: WebSocketTestSession, interrupt: TestClient | None) -> Iterator[Message]:
    """Messages up to the one that says that the prompt is over; interrupts at the first step if asked to."""
    while True:
        message = told(socket)
        yield message
        if message["type"] == "progress" and interrupt is not None:
            interrupt.post("/interrupt")
        if message["type"] == "executing" and message["data"]["node"] is None:
            return


def told(socket: WebSocketTestSession) -> Message:
    """The next message; binary ones are taken apart as the web page does it."""
    message = socket.receive()
    if message.get("text"):
        return dict(json.loads(message["text"]))
    if message["type"] == "websocket.close":
        raise WebSocketDisconnect(message["code"])
    [event, second], rest = struct.unpack(">II", message["bytes"][:8]), message["bytes"][8:]
    about: Message = {"event_type": event}
    if event == 4:
        about["metadata"] = json.loads(rest[:second])
        rest = rest[second:]
    assert rest.startswith(b"\xff\xd8"), "a JPEG"
    return {"type": "binary", "data": about}


def without(binary: Message) -> Message:
    """Of a recorded binary message what can be compared: lengths and bytes are the picture's."""
    return {key: value for key, value in binary.items() if key in ("event_type", "metadata")}


def line(message: Message) -> str:
    """A message's type, and which node it is about."""
    data = message["data"]
    if message["type"] == "progress_state":
        return "progress_state " + " ".join(f"{id}:{node['state']}" for id, node in data["nodes"].items())
    about = data.get("node", data.get("event_type", data.get("status", data.get("nodes", ""))))
    return f"{message['type']} {about}"


def steps_once(messages: list[Message]) -> list[Message]:
    """The messages with those of a sampler's first step only: how many previews are left out is a matter of time."""
    kept, stepped = list[Message](), 0
    for message in messages:
        running = message["type"] == "progress_state" and any(
            node["state"] == "running" and node["value"] > 0 for node in message["data"]["nodes"].values()
        )
        stepped += running
        if stepped <= 1 or not (running or message["type"] in ("binary", "progress")):
            kept.append(message)
    return kept


def alike(recorded: list[Message], given: list[Message]) -> list[str]:
    """What differs between messages in types, keys and kinds of values."""
    found = []
    for theirs, ours in zip(recorded, given, strict=True):
        # Progress is a whole number or not as it happens; which nodes there are is compared by `line`.
        for message in (theirs, ours):
            for node in message["data"].get("nodes", {}).values() if message["type"] == "progress_state" else ():
                node.update(value=float(node["value"]), max=float(node["max"]))
            if message["type"] == "execution_error":
                message["data"].update(current_inputs={}, executed=sorted(message["data"]["executed"]))
        found += [f"{theirs['type']}: {each}" for each in shape_differences(theirs, ours, "")]
    return found


# Who is told what


def test_only_who_queued_a_prompt_is_told_of_it_and_all_of_the_queue(graphs: TestClient) -> None:
    with connect(graphs, "mine") as mine, connect(graphs, "other") as other, connect(graphs, "mine") as copied_tab:
        graphs.post("/prompt", json={"prompt": image_prompt(), "client_id": "mine"})
        first = [line(each) for each in whole_run(mine, None)]
        assert "executed 2" in first
        assert [line(each) for each in whole_run(copied_tab, None)] == first
        until_idle(graphs)
        heard = [told(other) for _ in range(4)]
    assert {message["type"] for message in heard} == {"status"}
    assert [message["data"]["status"]["exec_info"]["queue_remaining"] for message in heard] == [0, 1, 1, 0]


def test_the_history_has_what_a_client_is_told_has_ended(graphs: TestClient) -> None:
    with connect(graphs, "me") as socket:
        for number in range(5):
            body = {"prompt": image_prompt(colour=number), "client_id": "me", "prompt_id": f"prompt-{number}"}
            graphs.post("/prompt", json=body)
            for message in whole_run(socket, None):
                if message["type"] == "execution_success":
                    assert graphs.get(f"/history/prompt-{number}").json() != {}


def test_plain_programs_get_previews_if_they_asked_only(graphs: TestClient) -> None:
    """They take every picture on their socket for a result."""
    clients = clients_of(graphs)
    clients.previews = "auto"
    of = {"node_id": "3", "prompt_id": "p", "image_type": "image/jpeg"}
    progress = {"type": "progress", "data": {"value": 1, "max": 2, "prompt_id": "p", "node": "3"}}

    seen: list[bool] = []

    def pictures(flags: bool, extra_data: Message, **more: Any) -> int:
        reader = clients.join("me")
        reader.knows_metadata = flags
        clients.expect("p", "me", extra_data)
        seen.append(clients.see("p"))
        clients.hear(Event("p", "preview", {**of, **more}, b"\xff\xd8"))
        clients.hear(Event("p", "comfy", progress))
        clients.leave(reader)
        clients.forget("p")
        return sum(isinstance(message, bytes) for message in waiting(reader))

    assert pictures(True, {}) == 1
    assert pictures(False, {}) == 0
    assert pictures(False, {"preview_method": "none"}) == 0
    assert pictures(False, {"preview_method": "latent2rgb"}) == 1
    assert pictures(False, {}, image_type="image/png") == 1, "a node that saves to the websocket"
    assert seen == [True, False, False, True, False], "and none are made that nobody gets"
    assert not clients.see("p"), "it is over"


def test_who_comes_back_is_told_where_things_stand(graphs: TestClient) -> None:
    clients = clients_of(graphs)
    clients.expect("p", "me", {})
    data = {"prompt_id": "p", "timestamp": 1}
    clients.hear(Event("p", "comfy", {"type": "execution_start", "data": data}))
    clients.hear(Event("p", "comfy", {"type": "progress_state", "data": {"prompt_id": "p", "nodes": {}}}))
    clients.hear(Event("p", "comfy", {"type": "executing", "data": {"node": "3", "prompt_id": "p"}}))
    told = [json.loads(message) for message in waiting(clients.join("me"))]
    assert [message["type"] for message in told] == ["status", "progress_state", "executing"]
    assert told[0]["data"] == {"status": {"exec_info": {"queue_remaining": 1}}, "sid": "me"}
    assert told[2]["data"]["node"] == "3"
    assert [json.loads(message)["type"] for message in waiting(clients.join("somebody else"))] == ["status"]


def test_prompts_left_by_an_earlier_server_are_counted(make_server: MakeServer, tmp_path: Path) -> None:
    folder = {"data_dir": tmp_path / "kept"}
    first = ready(make_server(load=graph_load, **folder))
    state_of(first).service.pause()
    first.post("/prompt", json={"prompt": image_prompt(), "client_id": "me"})
    first.__exit__(None, None, None)
    settings = settings_in(tmp_path / "0", **folder)
    with TestClient(create_app(settings, State(settings, load=graph_load)), base_url=HOST) as second:
        until(lambda: len(second.get("/history").json()) == 1, "it is done")
        until(lambda: second.get("/prompt").json()["exec_info"]["queue_remaining"] == 0, "nothing is left")


@pytest.mark.parametrize("client", ["x" * 201, "a%00b", "a%0Ab"])
def test_senseless_names_are_turned_away(graphs: TestClient, client: str) -> None:
    with pytest.raises(WebSocketDisconnect), connect(graphs, client):
        pass


@pytest.mark.parametrize(
    "text", ["{", "[]", "null", '{"type": 5}', "[" * 50_000, '{"type": "feature_flags", "data": 1}']
)
def test_what_makes_no_sense_is_passed_over(graphs: TestClient, text: str) -> None:
    with connect(graphs, "me") as socket:
        told(socket)
        socket.send_text(text)
        socket.send_json({"type": "feature_flags", "data": {"supports_preview_metadata": True}})
        while told(socket)["type"] != "feature_flags":
            pass


# Who is slow


def test_previews_leave_first_then_progress_and_nothing_else() -> None:
    outbox = Outbox()
    for number in range(MOST_PASSING):
        outbox.put(f"lasting {number}", Worth.LASTING)
        outbox.put(f"progress {number}", Worth.PASSING)
        outbox.put(f"preview {number}".encode(), Worth.PREVIEW)
    left = waiting(outbox)
    assert [each for each in left if str(each).startswith("lasting")] == [f"lasting {n}" for n in range(MOST_PASSING)]
    assert not outbox.overflowed
    assert len(left) <= MOST_PASSING + MOST_PREVIEWS
    few = Outbox()
    for number in range(3 * MOST_PREVIEWS):
        few.put(f"{number}".encode(), Worth.PREVIEW)
    assert waiting(few) == [f"{number}".encode() for number in range(2 * MOST_PREVIEWS, 3 * MOST_PREVIEWS)], (
        "the latest"
    )


def test_a_reader_that_takes_nothing_is_let_go_and_delays_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("octavo.server.comfy.socket.SEND_PATIENCE", 0.02)

    class Stuck:
        closed: list[int]

        async def send_text(self, _text: str) -> None:
            await asyncio.Event().wait()

        async def close(self, code: int, _reason: str) -> None:
            self.closed = [code]

    async def run() -> Stuck:
        clients, stuck = Clients({}), Stuck()
        reader = clients.join("slow")
        clients.expect("p", "slow", {})
        for _ in range(MOST + 10):
            clients.hear(Event("p", "comfy", {"type": "executed", "data": {}}))
        assert reader.outbox.overflowed
        await asyncio.wait_for(_send(cast(Any, stuck), reader), 5)
        return stuck

    assert asyncio.run(run()).closed == [TOO_SLOW]


def waiting(of: Reader | Outbox) -> list[str | bytes]:
    """What is in an outbox."""
    outbox = of.outbox if isinstance(of, Reader) else of
    return [message for _, message in outbox._waiting]
