"""The frame: a server answers at once, says how it is, and stops in good order."""

from starlette.testclient import TestClient


def test_it_is_alive(server: TestClient) -> None:
    answer = server.get("/health")
    assert answer.status_code == 200
    assert answer.json()["status"] == "ok"
