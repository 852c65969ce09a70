"""Prompts on their way in, through the queue and into the history, as recorded of ComfyUI."""

import json
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.server.comfy.exchanges import differences, exchanges, send
from tests.server.comfy.servers import graph_load, image_prompt, ready, state_of, until_idle
from tests.server.conftest import MakeServer, until

# Where we differ, and why.
ON_PURPOSE = {
    "invalid json": "400 with a reason, not 500",
    "history offset": "a picture that was kept is listed for clients without a websocket, too",
}


@pytest.fixture
def graphs(make_server: MakeServer) -> TestClient:
    """A server that runs workflows one after the other."""
    return ready(make_server(load=graph_load, workers=1))


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


BAD_BODIES = [
    b"{nope", b"[]", b'"text"', b"1e999", b'{"prompt": NaN}', b'{"prompt": {"1": "\\ud800"}}', b"\xff\xfe",
    b"[" * 100_000, b'{"prompt": {}, "client_id": 5}', b'{"prompt": {}, "extra_data": []}', b'{"prompt": null}',
    b'{"prompt": {}, "number": "first"}', b'{"prompt": {}, "prompt_id": {}}', b'{"prompt": {"1": null}}',
    b'{"prompt": {"1": {"inputs": 3}}}', b'{"prompt": {}, "partial_execution_targets": 3}',
    b'{"prompt": {}, "partial_execution_targets": [[]]}',
]  # fmt: skip


@pytest.mark.parametrize("path", ["/prompt", "/queue", "/history", "/interrupt", "/free", "/jobs/cancel", "/users"])
def test_no_body_is_a_fault_of_ours(graphs: TestClient, path: str) -> None:
    for body in BAD_BODIES:
        answer = graphs.post(path, content=body)
        assert answer.status_code in ((400,) if path == "/prompt" else (200, 400)), body[:60]
        if answer.status_code == 400:
            assert len(answer.json()["error"]["message"]) > 10, body[:60]


@pytest.mark.parametrize("content_type", [None, "text/plain", "application/x-www-form-urlencoded"])
def test_clients_that_do_not_say_json_are_understood(graphs: TestClient, content_type: str | None) -> None:
    headers = {"content-type": content_type} if content_type else {}
    answer = graphs.post("/prompt", content=json.dumps({"prompt": image_prompt()}), headers=headers)
    assert answer.status_code == 200


def test_what_was_accepted_waits_in_order_of_its_numbers(graphs: TestClient) -> None:
    state_of(graphs).service.pause()
    ids = {}
    for name, place in (
        ("plain", {}),
        ("later", {"number": 1e6}),
        ("front", {"front": True}),
        ("first", {"number": -1e6}),
    ):
        ids[name] = graphs.post("/prompt", json={"prompt": image_prompt(), **place}).json()["prompt_id"]
    waiting = [item[1] for item in graphs.get("/queue").json()["queue_pending"]]
    assert waiting == [ids["first"], ids["front"], ids["plain"], ids["later"]]
    state_of(graphs).service.resume()


def test_an_id_stands_for_one_prompt(graphs: TestClient) -> None:
    body = {"prompt": image_prompt(), "prompt_id": "mine"}
    assert graphs.post("/prompt", json=body).status_code == 200
    until_idle(graphs)
    again = graphs.post("/prompt", json=body)
    assert again.status_code in (400, 409)
    assert "mine" in again.json()["error"]["message"]
    assert graphs.get("/prompt").json() == {"exec_info": {"queue_remaining": 0}}


def test_the_same_request_with_the_same_key_is_one_prompt(graphs: TestClient) -> None:
    headers = {"Idempotency-Key": "once"}
    body = {"prompt": image_prompt(), "extra_data": {}}
    first, second = (graphs.post("/prompt", json=body, headers=headers).json() for _ in range(2))
    assert first["prompt_id"] == second["prompt_id"]
    until_idle(graphs)
    assert len(graphs.get("/history").json()) == 1
    assert graphs.get("/prompt").json()["exec_info"]["queue_remaining"] == 0


def test_a_full_queue_says_when_to_come_again(make_server: MakeServer) -> None:
    server = ready(make_server(load=graph_load, queue_limit=2))
    state_of(server).service.pause()
    answers = [server.post("/prompt", json={"prompt": image_prompt()}) for _ in range(4)]
    assert [answer.status_code for answer in answers] == [200, 200, 429, 429]
    assert int(answers[-1].headers["Retry-After"]) >= 1
    assert server.get("/prompt").json()["exec_info"]["queue_remaining"] == 2


def test_callers_take_back_what_is_theirs(make_server: MakeServer) -> None:
    """Two keys; each sees all, and clears, deletes and stops its own."""
    keys = ("the-first-key-of-all", "the-second-key-of-all")
    server = ready(make_server(load=graph_load, api_keys=keys))
    mine, other = ({"Authorization": f"Bearer {key}"} for key in keys)
    state_of(server).service.pause()

    def post_as(headers: dict[str, str]) -> str:
        return str(server.post("/prompt", json={"prompt": image_prompt()}, headers=headers).json()["prompt_id"])

    first, second, third = post_as(mine), post_as(other), post_as(other)
    assert len(server.get("/queue", headers=mine).json()["queue_pending"]) == 3
    server.post("/queue", json={"delete": [second]}, headers=mine)
    server.post("/queue", json={"clear": True}, headers=mine)
    server.post(f"/jobs/{third}/cancel", headers=mine)
    assert {item[1] for item in server.get("/queue", headers=mine).json()["queue_pending"]} == {second, third}
    server.post("/queue", json={"delete": [second]}, headers=other)
    assert [item[1] for item in server.get("/queue", headers=other).json()["queue_pending"]] == [third]
    assert server.get(f"/history/{first}", headers=mine).json() == {}
    assert server.get("/queue").status_code == 401


def test_secrets_of_the_page_are_not_kept(graphs: TestClient) -> None:
    secrets = {"auth_token_comfy_org": "S3CRET", "api_key_comfy_org": "S3CRET", "other": "kept"}
    id = graphs.post("/prompt", json={"prompt": image_prompt(), "extra_data": secrets}).json()["prompt_id"]
    until_idle(graphs)
    told = graphs.get(f"/history/{id}").text
    assert "kept" in told
    assert "S3CRET" not in told
