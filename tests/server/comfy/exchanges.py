"""Recorded answers of ComfyUI, and what makes an answer of ours equal to one: status, type, keys, kinds of values."""

import json
import re
from collections.abc import Iterator, Mapping
from io import BytesIO
from typing import Any

import httpx
from PIL import Image
from starlette.testclient import TestClient

from tests.goldens import golden

HOST = "http://127.0.0.1:8188"  # of the servers in `tests/server/conftest.py`
RECORDED_HOST = "http://127.0.0.1:8199"
MODELS = {"sd35_tiny.safetensors": "octavo-demo.safetensors"}  # the recording's model, and ours in its place

UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")

Exchange = dict[str, Any]


def exchanges(name: str) -> list[Exchange]:
    """The exchanges of one recording, about our model at our address."""
    text = golden(f"comfyui/api/{name}.json").read_text("utf-8").replace(RECORDED_HOST, HOST)
    for recorded, ours in MODELS.items():
        text = text.replace(recorded, ours)
    return list(json.loads(text)["exchanges"])


def send(
    server: TestClient, request: Mapping[str, Any], files: Mapping[tuple[str, int], bytes] | None = None
) -> httpx.Response:
    """Repeat a recorded request; pictures that were sent, of which only the size was kept, are in `files`."""
    more: dict[str, Any] = {"headers": dict(request.get("headers", {}))}
    if "json" in request:
        more["json"] = request["json"]
    if "raw_body" in request:
        more["content"] = request["raw_body"]
    if "multipart" in request:
        fields: list[tuple[str, Any]] = []
        for name, value in request["multipart"].items():
            if isinstance(value, dict) and name == "image":
                content = (files or {}).get((value["filename"], value.get("bytes", 0)), PICTURE)
                fields.append((name, (value["filename"], content, value.get("content_type", "image/png"))))
            else:
                fields.append((name, (None, value if isinstance(value, str) else json.dumps(value))))
        more["files"] = fields
    return server.request(request["method"], request["path"], **more)


def differences(recorded: Mapping[str, Any], answer: httpx.Response) -> list[str]:
    """How an answer differs from the recorded one; nothing where it does not."""
    found = []
    if answer.status_code != recorded["status"]:
        return [f"status {answer.status_code} for {recorded['status']}: {answer.text[:200]}"]
    if recorded["status"] < 400:
        expected = recorded["headers"].get("Content-Type", "").partition(";")[0]
        given = answer.headers.get("content-type", "").partition(";")[0]
        if expected and given != expected:
            found.append(f"type {given} for {expected}")
    if "json" in recorded:
        found += shape_differences(recorded["json"], answer.json(), "")
    if recorded["status"] == 200 and recorded.get("text") == "" and answer.content:
        found.append(f"a body, {answer.text[:100]}")
    if "Content-Disposition" in recorded["headers"]:
        given = answer.headers.get("content-disposition")
        if given != recorded["headers"]["Content-Disposition"]:
            found.append(f"disposition {given}")
    return found


def shape_differences(recorded: Any, given: Any, where: str) -> Iterator[str] | list[str]:
    """Keys, kinds of values and `type` words that differ. A recorded `<…>` stands for something not kept."""
    if isinstance(recorded, dict):
        if any(key.startswith("<") for key in recorded):
            return []
        if not isinstance(given, dict):
            return [f"{where or '/'} is {kind(given)}, not an object"]
        recorded, given = without_ids(recorded), without_ids(given)
        if set(given) != set(recorded):
            return [f"{where or '/'} has the keys {sorted(given)}, not {sorted(recorded)}"]
        return [each for key in recorded for each in shape_differences(recorded[key], given[key], f"{where}/{key}")]
    if kind(given) != kind(recorded):
        return [f"{where} is {given!r:.80}, not {recorded!r:.80}"]
    if where.endswith("/errors"):  # ComfyUI's are in no order
        recorded, given = ([*sorted(each, key=lambda fault: fault["details"])] for each in (recorded, given))
    if isinstance(recorded, list) and recorded and given:
        return list(shape_differences(recorded[0], given[0], f"{where}/0"))
    if where.endswith(("/type", "/status_str", "/mediaType")) and given != recorded:
        return [f"{where} is {given!r}, not {recorded!r}"]
    return []


def without_ids(value: Mapping[str, Any]) -> dict[str, Any]:
    """The same object; where its keys are ids of prompts, these are numbered."""
    return {f"id {n}" if UUID.fullmatch(key) else key: each for n, (key, each) in enumerate(value.items())}


def kind(value: Any) -> str:
    """What JSON calls it; whole numbers are told from others."""
    kinds = {bool: "truth", int: "integer", float: "number", str: "text", list: "list", dict: "object"}
    return kinds.get(type(value), "null")


def png(width: int = 4, height: int = 4, *, colour: tuple[int, ...] = (200, 30, 30, 128)) -> bytes:
    """A picture as a file."""
    buffer = BytesIO()
    Image.new("RGBA" if len(colour) == 4 else "RGB", (width, height), colour).save(buffer, "PNG")
    return buffer.getvalue()


PICTURE = png()
