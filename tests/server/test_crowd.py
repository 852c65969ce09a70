"""Two hundred clients of every kind at once, some of whom change their minds or go away."""

import base64
import io
import json
import resource
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from PIL import Image

from tests.server.comfy.servers import image_prompt
from tests.server.conftest import PATIENCE, Live, until

CLIENTS = 200
SAMPLERS = ("euler", "dpmpp_2m", "euler_ancestral", "heun", "dpmpp_sde")


def wish(number: int) -> dict[str, Any]:
    """What a client asks for: small, and unlike its neighbours'."""
    return {"prompt": f"a red circle {number % 7}", "seed": number, "steps": 1 + number % 4}


def a1111(http: httpx.Client, number: int) -> str:
    body = wish(number) | {"sampler_name": SAMPLERS[number % 5], "width": 32, "height": 32 + 16 * (number % 2)}
    answer = http.post("/sdapi/v1/txt2img", json=body)
    assert answer.status_code == 200, answer.text
    assert json.loads(answer.json()["info"])["all_seeds"] == [number]
    assert Image.open(io.BytesIO(base64.b64decode(answer.json()["images"][0]))).size[0] == 32
    return "drawn"


def openai(http: httpx.Client, number: int) -> str:
    answer = http.post("/v1/images/generations", json=wish(number) | {"size": "32x32", "n": 1 + number % 2})
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["data"]) == 1 + number % 2
    return "drawn"


def stream(http: httpx.Client, number: int) -> str:
    body = wish(number) | {"size": "32x32", "stream": True, "partial_images": 1}
    with http.stream("POST", "/v1/images/generations", json=body) as answer:
        kinds = [line.removeprefix("event: ") for line in answer.iter_lines() if line.startswith("event: ")]
    assert kinds[-1] == "image_generation.completed"
    return "drawn"


def comfyui(http: httpx.Client, number: int) -> str:
    prompt = image_prompt(f"crowd {number}", colour=number)
    answer = http.post("/prompt", json={"prompt": prompt, "client_id": f"client {number}"})
    assert answer.status_code == 200, answer.text
    id, end = answer.json()["prompt_id"], time.monotonic() + PATIENCE * 2
    while id not in (records := http.get(f"/history/{id}").json()):
        assert time.monotonic() < end
        time.sleep(0.2)
    (image,) = records[id]["outputs"]["2"]["images"]
    shown = http.get("/view", params={key: image[key] for key in ("filename", "subfolder", "type")})
    assert Image.open(io.BytesIO(shown.content)).getpixel((0, 0)) == (0, 0, number)
    return "drawn"


def leaves(http: httpx.Client, number: int) -> str:
    body = json.dumps(wish(number) | {"steps": 50, "width": 64, "height": 64}).encode()
    head = f"POST /sdapi/v1/txt2img HTTP/1.1\r\nHost: {http.base_url.host}\r\nContent-Type: application/json\r\n"
    with socket.create_connection((http.base_url.host, http.base_url.port or 80), timeout=PATIENCE) as line:
        line.sendall(head.encode() + b"Content-Length: %d\r\n\r\n%b" % (len(body), body))
    return "left"


def gives_up(http: httpx.Client, number: int) -> str:
    headers = {"X-Octavo-Timeout": "0.05"}
    answer = http.post("/v1/images/generations", json=wish(number) | {"steps": 200, "size": "64x64"}, headers=headers)
    assert answer.status_code == 408, answer.text
    return "given up"


def of_kind(number: int) -> Any:
    if number % 20 < 2:
        return (leaves, gives_up)[number % 20]
    return (a1111, openai, stream, comfyui)[number % 4]


@pytest.mark.slow
def test_two_hundred_clients_get_what_they_asked_for(live_model: Live) -> None:
    state = live_model.state
    with httpx.Client(base_url=live_model.url, timeout=PATIENCE * 4, limits=httpx.Limits(max_connections=60)) as http:
        before = {job.id for job in state.queue.history()}
        with ThreadPoolExecutor(40) as pool:
            counted = Counter(pool.map(lambda number: of_kind(number)(http, number), range(CLIENTS)))
        assert counted == {"drawn": CLIENTS - 20, "left": 10, "given up": 10}
        until(lambda: state.queue.depth() == {"queued": 0, "running": 0}, "the queue is empty")
        assert httpx.get(f"{live_model.url}/ready").status_code == 200
    jobs = [job for job in state.queue.history(limit=CLIENTS * 2) if job.id not in before]
    states = Counter(job.state for job in jobs)
    assert states["done"] >= CLIENTS - 20
    assert states["failed"] <= 10  # those with a deadline, if the queue had them in time
    assert len(jobs) <= CLIENTS
    # Every picture is there once, under a name of its own.
    names = [picture["path"] for job in jobs for picture in (job.result or {}).get("pictures", ())]
    assert len(set(names)) == len(names)
    assert all((live_model.settings.output_dir / name).is_file() for name in names)
    # Nobody is remembered who is gone.
    until(lambda: not state.events._of, "followers are forgotten")
    until(
        lambda: not [each for each in threading.enumerate() if each.name.startswith("octavo-picture")], "all is drawn"
    )


@pytest.mark.slow
def test_memory_stays_flat_over_two_thousand_requests(live_model: Live) -> None:
    """A leak of 10 KB a request, be it of a follower, a job or a picture, would be 15 MB."""

    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()

    with httpx.Client(base_url=live_model.url, timeout=PATIENCE) as http:

        def some(first: int, last: int) -> None:
            for number in range(first, last):
                size = {"width": 16, "height": 16, "steps": 1, "sampler_name": "Euler"}
                body = {"prompt": f"a red circle {number % 3}", "seed": number, **size}
                assert http.post("/sdapi/v1/txt2img", json=body).status_code == 200

        some(0, 500)
        before = resident()
        some(500, 2000)
        assert resident() - before < 15_000_000
