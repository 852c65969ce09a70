"""What the server tells of itself: nodes, models, the machine, its log."""

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from starlette.testclient import TestClient

from octavo.graph.nodes import NODES
from tests.server.comfy.exchanges import png
from tests.server.comfy.servers import clients_of, ready, state_of
from tests.server.conftest import MakeServer

KEY = "octavo-0123456789abcdefghijklmnopqrstuvwxyz"


@pytest.fixture
def models(server: TestClient) -> Path:
    folder = state_of(server).settings.models_dir
    assert folder is not None
    (folder / "loras" / "sub").mkdir(parents=True)
    (folder / "embeddings").mkdir()
    save_file({"a": torch.zeros(2)}, folder / "loras" / "sub" / "style.safetensors", metadata={"made": "by me"})
    save_file({"a": torch.zeros(2)}, folder / "embeddings" / "word.safetensors")
    return folder


def test_every_node_is_described(server: TestClient) -> None:
    described = server.get("/object_info").json()
    assert set(described) == {name for name, spec in NODES.items() if spec.listed}
    for name in ("KSampler", "SaveImage"):
        assert server.get(f"/object_info/{name}").json() == {name: described[name]}
    names = described["CheckpointLoaderSimple"]["input"]["required"]["ckpt_name"][0]
    assert "octavo-demo.safetensors" in names


def test_pictures_that_were_sent_can_be_chosen(server: TestClient) -> None:
    server.post("/upload/image", files={"image": ("mine.png", png())})
    info = server.get("/object_info/LoadImage").json()["LoadImage"]
    assert info["input"]["required"]["image"][0] == ["mine.png"]
    assert server.get("/internal/files/input").json() == ["mine.png"]
    assert server.get("/internal/files/nonsense").status_code == 400


def test_models_are_listed_with_what_they_say_of_themselves(server: TestClient, models: Path) -> None:
    assert server.get("/models/loras").json() == ["sub/style.safetensors"]
    [entry] = server.get("/experiment/models/loras").json()
    assert entry["size"] == (models / "loras" / "sub" / "style.safetensors").stat().st_size
    assert server.get("/view_metadata/loras?filename=sub/style.safetensors").json() == {"made": "by me"}
    assert server.get("/embeddings").json() == ["word"]
    (models / "loras" / "bad.safetensors").write_bytes(b"no header")
    assert server.get("/view_metadata/loras?filename=bad.safetensors").status_code == 404
    listed = server.get("/assets?include_tags=models,loras&limit=1").json()
    assert (len(listed["assets"]), listed["total"], listed["has_more"]) == (1, 2, True)
    assert server.get("/assets?name_contains=STYLE&exclude_tags=input").json()["total"] == 1
    for query in ("limit=0", "limit=x", "offset=-1", "limit=" + "9" * 50):
        assert server.get(f"/assets?{query}").status_code == 400, query


def test_no_name_shows_a_model_outside(server: TestClient, models: Path, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "outside.safetensors", metadata={"secret": "x"})
    for name in (f"{tmp_path}/outside.safetensors", "../../../../outside.safetensors", "", "sub"):
        assert server.get("/view_metadata/loras", params={"filename": name}).status_code == 404, name
    for folder in ("..", "loras%2F..", "%2Fetc", "nosuch"):
        for route in ("models", "experiment/models", "view_metadata"):
            assert server.get(f"/{route}/{folder}").status_code in (200, 404)
    told = server.get("/internal/folder_paths").text + server.get("/experiment/models").text
    assert str(models.parent) not in told, "where on the disk is nobody's business"


def test_the_log_is_shown_without_secrets(server: TestClient) -> None:
    server.patch("/internal/logs/subscribe", json={"enabled": True, "clientId": "nobody"})
    assert clients_of(server).log_readers == set(), "only who listens is remembered"
    with server.websocket_connect("ws://127.0.0.1:8188/ws?clientId=me") as socket:
        socket.receive_json()
        server.patch("/internal/logs/subscribe", json={"enabled": True, "clientId": "me"})
        logging.getLogger("octavo.engine.service").warning("a line with %s", KEY)
        told: list[str] = []
        while not any(line.startswith("a line with") for line in told):  # others are told of meanwhile
            message = socket.receive_json()
            told += [entry["m"] for entry in message["data"]["entries"]] if message["type"] == "logs" else []
    assert "a line with [secret]\n" in told
    assert "a line with [secret]" in server.get("/internal/logs").json()
    assert KEY not in json.dumps(server.get("/internal/logs/raw").json())


def test_no_secret_is_in_the_machine_s_report(make_server: MakeServer) -> None:
    server = ready(make_server(api_keys=(KEY,)))
    assert KEY not in server.get("/system_stats", headers={"Authorization": f"Bearer {KEY}"}).text
    assert server.get("/system_stats").status_code == 401
