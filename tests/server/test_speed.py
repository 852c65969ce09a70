"""The speed of a request through every door, and the server's own where it says none."""

from collections.abc import Callable
from typing import Any

import pytest
from starlette.testclient import TestClient

from octavo.errors import RequestError
from octavo.pipeline.speed import SPEEDS
from octavo.server.settings import SPEED_NAMES, Settings, gather
from tests.server.conftest import Live, MakeServer, until
from tests.server.test_page import ask, ended


def by_page(server: TestClient, speed: str | None) -> str:
    job = ask(server, **({} if speed is None else {"speed": speed}))
    ended(server, job["id"])
    found: str = job["settings"]["speed"]
    return found


def stored_speed(server: TestClient) -> str:
    """Of the picture drawn last."""
    job = server.get("/octavo/jobs").json()["jobs"][0]
    found: str = job["pictures"][0]["settings"]["speed"]
    return found


def by_a1111(server: TestClient, speed: str | None) -> str:
    options = {} if speed is None else {"override_settings": {"octavo_speed": speed}}
    assert server.post("/sdapi/v1/txt2img", json={"prompt": "a star", **options}).status_code == 200
    return stored_speed(server)


def by_openai(server: TestClient, speed: str | None) -> str:
    own = {} if speed is None else {"speed": speed}
    assert server.post("/v1/images/generations", json={"prompt": "a star", **own}).status_code == 200
    return stored_speed(server)


DOORS = {"page": by_page, "a1111": by_a1111, "openai": by_openai}


@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
def test_a_request_has_the_speed_it_asks_for_else_the_servers(
    make_server: MakeServer, door: Callable[[TestClient, str | None], str]
) -> None:
    plain, quick = make_server(), make_server(speed="balanced")
    assert door(plain, None) == "exact"
    assert door(quick, None) == "balanced"
    assert door(quick, "exact") == "exact"
    assert door(plain, "fast") == "fast"


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/octavo/jobs", {"prompt": "a", "speed": "slow"}, 422),
        ("/sdapi/v1/txt2img", {"prompt": "a", "override_settings": {"octavo_speed": "slow"}}, 422),
        ("/v1/images/generations", {"prompt": "a", "speed": "slow"}, 400),
    ],
)
def test_no_other_speed_is_taken(server: TestClient, path: str, body: dict[str, Any], status: int) -> None:
    answer = server.post(path, json=body)
    assert answer.status_code == status
    assert "speed" in answer.text


def test_a1111s_option_is_shown_and_kept(server: TestClient) -> None:
    assert server.get("/sdapi/v1/options").json()["octavo_speed"] == "exact"
    assert server.post("/sdapi/v1/options", json={"octavo_speed": "fast"}).status_code == 200
    assert server.get("/sdapi/v1/options").json()["octavo_speed"] == "fast"
    assert by_a1111(server, None) == "fast"


def test_the_page_is_told_what_there_is_to_choose(make_server: MakeServer) -> None:
    told = make_server(speed="fast").get("/octavo/models").json()
    assert (told["speeds"], told["speed"]) == (list(SPEEDS), "fast")


def test_the_servers_own_speed_is_a_setting() -> None:
    assert tuple(SPEEDS) == SPEED_NAMES
    assert gather({}, environment={"OCTAVO_SPEED": "fast"}).speed == "fast"
    with pytest.raises(RequestError, match="--speed 'slow'"):
        Settings(speed="slow")


def test_what_was_forecast_is_counted(live_model: Live) -> None:
    import httpx

    def counted() -> float:
        text = httpx.get(f"{live_model.url}/metrics").text
        (line,) = (line for line in text.splitlines() if line.startswith("octavo_evaluations_forecast_total"))
        return float(line.split()[1])

    before = counted()
    wish = {"prompt": "a red star", "seed": 7, "width": 64, "height": 64, "steps": 20, "speed": "fast"}
    job = httpx.post(f"{live_model.url}/octavo/jobs", json=wish).json()
    until(lambda: httpx.get(f"{live_model.url}/octavo/jobs/{job['id']}").json()["over"], "the job ends")
    assert 0 < counted() - before < 17
