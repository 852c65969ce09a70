"""All that was recorded of ComfyUI's plain routes, asked of our server: statuses, types, keys, kinds of values."""

import pytest
from starlette.testclient import TestClient

from tests.server.comfy.exchanges import differences, exchanges, png, send

# Where we differ, and why.
ON_PURPOSE = {
    "root": "/ is our own page",
    "GET /view_metadata/checkpoints?filename=octavo-demo.safetensors": "ours says something of itself",
    "GET /internal/folder_paths": "configs and custom_nodes are no folders of ours",
    "upload bad type": "400 with a reason, not 500",
}
OTHER_PICTURE = png(3, 3, colour=(1, 2, 3))
FILES = {("up.png", 77): OTHER_PICTURE}


@pytest.mark.parametrize("recording", ["info", "userdata", "files"])
def test_answers_equal_the_recorded_ones(server: TestClient, recording: str) -> None:
    """In the recorded order, for some build on what others left."""
    found = {}
    for exchange in exchanges(recording):
        answer = send(server, exchange["request"], FILES)
        different = list(differences(exchange["response"], answer))
        if different and exchange["name"] not in ON_PURPOSE:
            found[exchange["name"]] = different
        assert answer.status_code < 500, exchange["name"]
    assert not found


def test_a_difference_is_seen(server: TestClient) -> None:
    """The comparison itself: a recording that says otherwise does not pass."""
    exchange = next(each for each in exchanges("info") if each["name"] == "GET /features")
    answer = send(server, exchange["request"])
    recorded = exchange["response"]
    assert not list(differences(recorded, answer))
    assert differences({**recorded, "status": 201}, answer)
    assert differences({**recorded, "json": {**recorded["json"], "more": 1}}, answer)
    assert differences({**recorded, "json": {**recorded["json"], "max_upload_size": "1"}}, answer)


@pytest.mark.parametrize("prefix", ["/api", "/comfy", "/comfy/api"])
def test_each_route_is_below_the_prefixes_too(server: TestClient, prefix: str) -> None:
    documented = server.get("/openapi.json").json()["paths"]
    mine = [
        path
        for path, methods in documented.items()
        if "{" not in path and any(tag.startswith("ComfyUI") for tag in methods.get("get", {}).get("tags", ()))
    ]
    assert len(mine) > 20
    assert not any(path.startswith(("/api/", "/comfy/")) for path in documented), "documented once"
    for path in mine:
        plain, prefixed = server.get(path), server.get(prefix + path)
        assert prefixed.status_code == plain.status_code, path
        assert prefixed.headers.get("content-type") == plain.headers.get("content-type"), path
