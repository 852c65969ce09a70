"""Two hundred clients of all APIs at once at a real server; some change their mind, some leave."""

import asyncio
import base64
import io
import json
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from websockets.asyncio.client import connect

from tests.server.conftest import PATIENCE, until
from tests.server.process import Process, files_in, files_of, jobs_in, serving, workflow

CLIENTS = 200
LONG = 400  # steps of a request that is taken back: it cannot be done before
ARENAS = 8 * 2**20  # bytes by which an allocator may differ from one look to the next
OVER = {"execution_success", "execution_error", "execution_interrupted"}
KINDS = ("comfyui", "a1111", "openai", "octavo")


class Crowd:
    """What the clients were told.

    Attributes:
        ends: by job id, how its client saw it end.
        statuses: of all answers.
    """

    def __init__(self, server: Process, http: httpx.AsyncClient) -> None:
        self.server, self.http = server, http
        self.ends: dict[str, str] = {}
        self.statuses: Counter[int] = Counter()

    async def call(self, method: str, path: str, **more: Any) -> httpx.Response:
        answer = await self.http.request(method, path, **more)
        self.statuses[answer.status_code] += 1
        return answer

    def end(self, id: str, how: str) -> None:
        assert id not in self.ends, "a job ends once"
        self.ends[id] = how


def wish(number: int, *, steps: int | None = None) -> dict[str, Any]:
    """What a client asks for; no two ask for the same."""
    return {"prompt": f"a red circle {number % 5}", "seed": number, "steps": steps or 1 + number % 4}


def side(number: int) -> int:
    return 64 if number % 3 else 96


# Those who wait for what they asked for


async def comfyui(crowd: Crowd, number: int) -> None:
    async with socket(crowd, f"client {number}") as messages:
        id = await queued(crowd, number)
        kinds = [message["type"] async for message in messages if message["data"].get("prompt_id") == id]
    assert [kind for kind in kinds if kind in OVER] == ["execution_success"]
    assert kinds[0] == "execution_start"
    (record,) = (await crowd.call("GET", f"/history/{id}")).json().values()
    (image,) = record["outputs"]["9"]["images"]
    shown = await crowd.call("GET", "/view", params={key: image[key] for key in ("filename", "subfolder", "type")})
    check_picture(shown.content, side(number))
    crowd.end(id, "done")


async def a1111(crowd: Crowd, number: int) -> None:
    size = {"width": side(number), "height": side(number)}
    answer = await crowd.call("POST", "/sdapi/v1/txt2img", json=wish(number) | size | {"batch_size": 1 + number % 2})
    assert answer.status_code == 200, answer.text
    info = json.loads(answer.json()["info"])
    assert info["all_seeds"] == [number + each for each in range(1 + number % 2)]
    for image in answer.json()["images"]:
        check_picture(base64.b64decode(image), side(number))
    crowd.end(info["job_id"], "done")


async def openai(crowd: Crowd, number: int) -> None:
    size = {"size": f"{side(number)}x{side(number)}"}
    if number % 8 < 4:
        answer = await crowd.call("POST", "/v1/images/generations", json=wish(number) | size)
        assert answer.status_code == 200, answer.text
        data = answer.json()["data"][0]["b64_json"]
    else:
        async with crowd.http.stream(
            "POST", "/v1/images/generations", json=wish(number) | size | {"stream": True, "partial_images": 1}
        ) as stream:
            lines = [line async for line in stream.aiter_lines() if line.startswith("data: ")]
        events = [json.loads(line.removeprefix("data: ")) for line in lines]
        assert [event["type"] for event in events].count("image_generation.completed") == 1
        data = events[-1]["b64_json"]
    check_picture(base64.b64decode(data), side(number))


async def octavo(crowd: Crowd, number: int) -> None:
    id = await ordered(crowd, number)
    job = await until_over(crowd, id)
    assert job["state"] == "done", job
    (picture,) = job["pictures"]
    check_picture((await crowd.call("GET", f"/{picture['url']}")).content, side(number))
    crowd.end(id, "done")


# Those who take it back


async def comfyui_cancels(crowd: Crowd, number: int) -> None:
    async with socket(crowd, f"client {number}") as messages:
        id = await queued(crowd, number, steps=LONG)
        ways = ({"path": "/queue", "json": {"delete": [id]}}, {"path": "/interrupt", "json": {"prompt_id": id}})
        ended = asyncio.create_task(last_of(messages, id))
        # Whether it waits or runs is the server's affair: try both until it is over.
        while (await crowd.call("GET", f"/jobs/{id}")).json().get("status") in ("pending", "in_progress"):
            for way in ways:
                assert (await crowd.call("POST", **way)).status_code == 200  # type: ignore[arg-type]
            await asyncio.sleep(0.05)
        status = (await crowd.call("GET", f"/jobs/{id}")).json().get("status")
        if status is None:  # it had not begun; nothing is told of it, as in ComfyUI
            ended.cancel()
        else:
            assert (status, await ended) == ("cancelled", "execution_interrupted")
    crowd.end(id, "cancelled" if status else "withdrawn")


async def octavo_cancels(crowd: Crowd, number: int) -> None:
    id = await ordered(crowd, number, steps=LONG)
    await asyncio.sleep(number % 7 / 10)
    await crowd.call("DELETE", f"/octavo/jobs/{id}")
    assert (await until_over(crowd, id))["state"] == "cancelled"
    crowd.end(id, "cancelled")


# Those who leave


async def leaves(crowd: Crowd, number: int) -> None:
    """Hangs up while it waits: the job is withdrawn where nobody could fetch its result any more."""
    size = {"width": 64, "height": 64}
    path, body = ("/sdapi/v1/txt2img", wish(number, steps=LONG) | size)
    if number % 8 < 4:
        path, body = "/v1/images/generations", wish(number, steps=LONG) | {"size": "64x64", "stream": number % 8 < 2}
    with pytest.raises(httpx.TimeoutException):
        await crowd.http.post(path, json=body, timeout=httpx.Timeout(PATIENCE, read=0.3 + number % 5 / 5))


async def comfyui_leaves(crowd: Crowd, number: int) -> None:
    """Its websocket breaks: the prompt is drawn all the same, for it can be fetched."""
    async with socket(crowd, f"client {number}"):
        id = await queued(crowd, number)
    crowd.end(id, "done")


def client(number: int) -> Callable[[Crowd, int], Awaitable[None]]:
    """Of twenty one takes back, one leaves, and the others are of all APIs in turn."""
    if number % 20 == 7:
        return (comfyui_cancels, octavo_cancels)[number // 20 % 2]
    if number % 20 == 13:
        return (leaves, leaves, comfyui_leaves)[number // 20 % 3]
    return (comfyui, a1111, openai, octavo)[number % 4]


@pytest.mark.timeout(240)
def test_every_request_of_a_crowd_ends_exactly_once(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        asyncio.run(one(server))  # whatever is kept from then on has been made
        files = server.files()
        crowd = asyncio.run(everybody(server))

        assert httpx.get(f"{server.url}/ready").status_code == 200
        assert not [status for status in crowd.statuses if status >= 500], crowd.statuses
        until(
            lambda: not any(job["state"] in ("queued", "running") for job in jobs_in(tmp_path).values()), "all is over"
        )
        jobs = jobs_in(tmp_path)
        for id, how in crowd.ends.items():
            assert (how == "withdrawn" and id not in jobs) or jobs[id]["state"] == how, (id, how)
        kinds = Counter(client(number).__name__ for number in range(CLIENTS))
        assert len(jobs) == 1 + CLIENTS - [*crowd.ends.values()].count("withdrawn"), "no job that nobody asked for"
        states = Counter(job["state"] for job in jobs.values())
        gone = kinds["leaves"] + kinds["octavo_cancels"] + [*crowd.ends.values()].count("cancelled")
        assert set(states) <= {"done", "cancelled"}, states
        assert states["cancelled"] == gone - kinds["octavo_cancels"], states

        # Every picture belongs to one job, and every job that is done has what it was asked for.
        named = Counter(name for job in jobs.values() for name in files_of(job))
        assert max(named.values()) == 1
        cancelled = [job for job in jobs.values() if job["state"] == "cancelled"]
        assert set(named) == set(files_in(tmp_path)), "files and results are the same"
        assert not any(files_of(job) for job in cancelled)
        for job in jobs.values():
            if job["state"] == "done":
                wanted = job["payload"]["request"]["batch"] if job["kind"] == "generate" else 1
                assert len(files_of(job)) == wanted

        assert counted(server) == {"queued": 0, "running": 0}
        assert httpx.get(f"{server.url}/prompt").json() == {"exec_info": {"queue_remaining": 0}}
        until(lambda: server.files() <= files + 3, "sockets and files are closed")
        assert server.threads() < 120, "threads come from bounded pools"
        assert "Traceback" not in server.said()
        assert " ERROR " not in server.said()


@pytest.mark.timeout(240)
def test_small_requests_leave_nothing_behind(tmp_path: Path) -> None:
    """The short form of benchmarks/server_leak.py: bounded caches are emptied before each look.

    A leak of one picture (12 KB of pixels), one follower or one socket a request would be over the bound.
    """

    def ask(http: httpx.Client, number: int) -> None:
        body = {"prompt": f"a red circle {number % 5}", "seed": number, "steps": 1, "width": 32, "height": 32}
        assert http.post("/sdapi/v1/txt2img", json=body).status_code == 200
        prompt = workflow(seed=number, steps=1, size=32)
        id = http.post("/prompt", json={"prompt": prompt}).json()["prompt_id"]
        until(lambda: bool(http.get(f"/history/{id}").json()), "the prompt is done")

    def held(http: httpx.Client) -> tuple[int, int, int]:
        assert http.post("/free", json={"unload_models": True, "free_memory": True}).status_code == 200
        return server.resident(), server.files(), server.threads()

    with serving(tmp_path) as server, httpx.Client(base_url=server.url, timeout=PATIENCE) as http:
        for number in range(60):
            ask(http, number)
        before = held(http)
        for number in range(60, 150):
            ask(http, number)
        after = held(http)
        assert after[0] - before[0] < 90 * 2 * 12 * 1024 + ARENAS, (before, after)
        assert after[1] <= before[1] + 1, "files and sockets"
        assert after[2] <= before[2] + 2, "threads"


async def one(server: Process) -> None:
    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE) as http:
        await octavo(Crowd(server, http), CLIENTS + 1)


async def everybody(server: Process) -> Crowd:
    limits = httpx.Limits(max_connections=CLIENTS, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE * 4, limits=limits) as http:
        crowd = Crowd(server, http)
        async with asyncio.TaskGroup() as group:
            for number in range(CLIENTS):
                group.create_task(client(number)(crowd, number))  # type: ignore[arg-type]
    return crowd


@asynccontextmanager
async def socket(crowd: Crowd, name: str) -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
    """Messages of a websocket, up to what comes last of a prompt."""
    url = crowd.server.url.replace("http", "ws")
    async with connect(f"{url}/ws?clientId={name.replace(' ', '-')}", open_timeout=PATIENCE * 4) as opened:

        async def messages() -> AsyncIterator[dict[str, Any]]:
            async for text in opened:
                if isinstance(text, str):
                    message = json.loads(text)
                    yield message
                    if message["type"] == "executing" and message["data"]["node"] is None:
                        return

        yield messages()


async def last_of(messages: AsyncIterator[dict[str, Any]], id: str) -> str:
    """How a prompt ended, as its websocket says."""
    (end,) = [each["type"] async for each in messages if each["type"] in OVER and each["data"]["prompt_id"] == id]
    return str(end)


async def queued(crowd: Crowd, number: int, *, steps: int | None = None) -> str:
    asked = wish(number, steps=steps)
    prompt = workflow(asked["prompt"], seed=number, steps=asked["steps"], size=side(number), name=f"client{number}")
    answer = await crowd.call("POST", "/prompt", json={"prompt": prompt, "client_id": f"client-{number}"})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["prompt_id"])


async def ordered(crowd: Crowd, number: int, *, steps: int | None = None) -> str:
    size = {"width": side(number), "height": side(number)}
    answer = await crowd.call("POST", "/octavo/jobs", json=wish(number, steps=steps) | size)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


async def until_over(crowd: Crowd, id: str) -> dict[str, Any]:
    while True:
        job: dict[str, Any] = (await crowd.call("GET", f"/octavo/jobs/{id}")).json()
        if job["over"]:
            return job
        await asyncio.sleep(1.0)


def check_picture(data: bytes, size: int) -> None:
    image = Image.open(io.BytesIO(data))
    image.load()
    assert image.size == (size, size)


def counted(server: Process) -> dict[str, int]:
    """How many requests wait and run, as the metrics say."""
    text = httpx.get(f"{server.url}/metrics").text
    found = [line for line in text.splitlines() if line.startswith("octavo_queue") and "{" in line]
    return {state: int(float(line.split()[-1])) for line in found for state in ("queued", "running") if state in line}
