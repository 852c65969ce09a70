"""A real server killed at any moment, under load, and started again on the same files: what was accepted is kept."""

import os
import random
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from tests.server.conftest import PATIENCE, until
from tests.server.process import Process, files_in, files_of, jobs_in, start, workflow

KILLS = int(os.environ.get("OCTAVO_TEST_KILLS", "4"))  # each costs a start; 20 take a minute and a half
AHEAD = 12  # requests that may wait; more would only make the test longer
OVER = ("done", "failed", "cancelled", "set_aside")


class Crowd:
    """Clients that ask for pictures for as long as there is a server.

    Attributes:
        accepted: ids that were answered.
        keyed: idempotency keys and what was asked for with them.
    """

    def __init__(self) -> None:
        self.accepted: list[str] = []
        self.keyed: dict[str, dict[str, Any]] = {}
        self._number = 0
        self._lock = threading.Lock()

    def press(self, server: Process) -> list[threading.Thread]:
        """Ask without end; the threads end with the server."""
        threads = [threading.Thread(target=self._ask, args=(server, each)) for each in (comfyui, octavo, a1111)]
        for thread in threads:
            thread.start()
        return threads

    def _ask(self, server: Process, way: Any) -> None:
        while server.popen.poll() is None:
            try:
                server.until_it_answers()
                with httpx.Client(base_url=server.url, timeout=PATIENCE) as http:
                    while http.get("/queue").status_code == 200:
                        if len([job for job in jobs_in(server.folder).values() if job["state"] == "queued"]) < AHEAD:
                            way(self, http, self._next())
                        time.sleep(0.02)
            except (httpx.TransportError, AssertionError):
                time.sleep(0.01)  # it has died

    def _next(self) -> int:
        with self._lock:
            self._number += 1
            return self._number


def comfyui(crowd: Crowd, http: httpx.Client, number: int) -> None:
    prompt = workflow(seed=number, steps=2 + number % 3, name=f"sub/n{number}")
    answer = http.post("/prompt", json={"prompt": prompt})
    assert answer.status_code in (200, 503), answer.text
    if answer.status_code == 200:
        crowd.accepted.append(answer.json()["prompt_id"])


def octavo(crowd: Crowd, http: httpx.Client, number: int) -> None:
    answer = http.post("/octavo/jobs", json=drawing(number) | {"batch": 1 + number % 2})
    assert answer.status_code in (201, 503), answer.text
    if answer.status_code == 201:
        crowd.accepted.append(answer.json()["id"])


def a1111(crowd: Crowd, http: httpx.Client, number: int) -> None:
    """Its request waits for the picture, so that the server may die before it answers; the key lets it come back."""
    crowd.keyed[f"key-{number}"] = drawing(number)
    http.post("/sdapi/v1/txt2img", json=drawing(number), headers={"Idempotency-Key": f"key-{number}"})


def drawing(number: int) -> dict[str, Any]:
    return {"prompt": "a red circle", "seed": number, "steps": 2 + number % 3, "width": 64, "height": 64}


@pytest.mark.timeout(600)
def test_whatever_was_accepted_outlives_kill_9(tmp_path: Path) -> None:
    chance, crowd = random.Random(), Crowd()
    for number in range(KILLS):
        server = start(tmp_path)
        threads = crowd.press(server)
        if number % 4 < 3:
            before = len(crowd.accepted)
            until(lambda before=before: len(crowd.accepted) > before + 1, "requests are accepted", PATIENCE * 4)  # type: ignore[misc]
        time.sleep(chance.uniform(0, 2))  # else it is killed while it starts, or takes up what is left
        server.kill()
        for thread in threads:
            thread.join(PATIENCE * 2)
            assert not thread.is_alive()
        assert "Traceback" not in server.said()

    server = start(tmp_path).until_ready()
    try:
        until(lambda: all(job["state"] in OVER for job in jobs_in(tmp_path).values()), "all is over", PATIENCE * 4)
        again = {key: fetched(server, key, wish) for key, wish in crowd.keyed.items()}
        jobs = jobs_in(tmp_path)
        assert "Traceback" not in server.said()
        check_told(server, jobs, crowd.accepted)
    finally:
        server.kill()

    # Nothing is lost, nothing runs twice.
    assert len(set(crowd.accepted)) == len(crowd.accepted) >= KILLS
    assert set(crowd.accepted) <= jobs.keys()
    states = Counter(job["state"] for job in jobs.values())
    assert set(states) <= {"done", "set_aside"}, states
    assert states["done"] > states["set_aside"]
    for job in jobs.values():
        assert (job["attempts"] < 2) == (job["state"] == "done")
        assert job["state"] == "done" or "ended 2 times while this request ran" in job["error"]["message"]
    keys = Counter(job["idempotency_key"] for job in jobs.values() if job["idempotency_key"])
    assert set(keys) == set(crowd.keyed), "a request that is sent again is the same one"
    assert set(keys.values()) <= {1}
    for key, status in again.items():
        (job,) = (each for each in jobs.values() if each["idempotency_key"] == key)
        assert status == (200 if job["state"] == "done" else 422), (key, status, job["error"])

    # Every picture is there, whole, once; and nothing else is.
    named = Counter(name for job in jobs.values() for name in files_of(job))
    assert set(named.values()) <= {1}
    assert sorted(named) == sorted(files_in(tmp_path))
    for name in named:
        with Image.open(tmp_path / "out" / name) as image:
            image.load()
            assert image.size == (64, 64)
    for job in jobs.values():
        wanted = job["payload"]["request"]["batch"] if job["kind"] == "generate" else 1
        assert len(files_of(job)) == (wanted if job["state"] == "done" else 0)
    print(f"{KILLS} kills, {len(jobs)} requests: {dict(states)}; {len(named)} pictures")


def fetched(server: Process, key: str, wish: dict[str, Any]) -> int:
    """The status that a client gets who sends its request again."""
    headers = {"Idempotency-Key": key}
    answer = httpx.post(f"{server.url}/sdapi/v1/txt2img", json=wish, headers=headers, timeout=PATIENCE)
    assert answer.status_code != 200 or len(answer.json()["images"]) == 1
    return answer.status_code


def check_told(server: Process, jobs: dict[str, dict[str, Any]], ids: list[str]) -> None:
    """Clients are told the same by the APIs that they used."""
    with httpx.Client(base_url=server.url, timeout=PATIENCE) as http:
        for id in ids:
            state = jobs[id]["state"]
            if jobs[id]["kind"] == "graph":
                (record,) = http.get(f"/history/{id}").json().values()
                assert record["status"]["completed"] == (state == "done")
            else:
                job = http.get(f"/octavo/jobs/{id}").json()
                assert (job["state"], bool(job["error"])) == (state, state != "done")
        assert http.get("/prompt").json() == {"exec_info": {"queue_remaining": 0}}
