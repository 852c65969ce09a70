"""Memory of a server over thousands of small requests; prints one line of JSON.

    python -m benchmarks.server_leak --requests 2000

A real `octavo serve` with the embedded model draws 64x64 px in one step, asked in turn by all four APIs, four clients
at a time. Told are resident bytes, sockets and threads after a quarter of the requests, when all that is kept has
been made, and at the end, and the growth for each request in between. Caches are bounded, but by more than this run
fills; so they are emptied (`/free`) every now and then, and before each look.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

CLIENTS = 4
BETWEEN = 125  # requests until caches are emptied
STARTING = 120.0  # seconds that a start may take
APIS = ("comfyui", "a1111", "openai", "octavo")


@contextmanager
def serving(folder: Path) -> Iterator[tuple[int, str]]:
    """A server on `folder`, ready: its process and its address."""
    log = folder / "log"
    command = [sys.executable, "-c", "from octavo.cli.main import main; main()", "serve", "--port", "0"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--device", "cpu", "--log-level", "warning"], cwd=folder, stdout=output, stderr=output
        )
    try:
        end = time.monotonic() + STARTING
        while time.monotonic() < end:
            found = re.search(r"http://127\.0\.0\.1:\d+", log.read_text("utf-8"))
            try:
                if found and httpx.get(f"{found[0]}/ready").status_code == 200:
                    yield process.pid, found[0]
                    return
            except httpx.TransportError:
                pass  # not yet
            time.sleep(0.1)
        raise TimeoutError(log.read_text("utf-8"))
    finally:
        process.terminate()
        process.wait()


def held(pid: int) -> dict[str, int]:
    """What a process holds: resident bytes, open files and sockets, threads."""
    pages = int(Path(f"/proc/{pid}/statm").read_text("ascii").split()[1])
    return {
        "bytes": pages * os.sysconf("SC_PAGE_SIZE"),
        "files": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": len(os.listdir(f"/proc/{pid}/task")),
    }


def ask(http: httpx.Client, number: int) -> None:
    """One small request, waited for."""
    wish = {"prompt": f"a red circle {number % 50}", "seed": number, "steps": 1}
    api = APIS[number % len(APIS)]
    if api == "comfyui":
        id = http.post("/prompt", json={"prompt": workflow(number)}).raise_for_status().json()["prompt_id"]
        while not http.get(f"/history/{id}").json():
            time.sleep(0.02)
    elif api == "a1111":
        http.post("/sdapi/v1/txt2img", json=wish | {"width": 64, "height": 64}).raise_for_status()
    elif api == "openai":
        http.post("/v1/images/generations", json=wish | {"size": "64x64"}).raise_for_status()
    else:
        job = http.post("/octavo/jobs", json=wish | {"width": 64, "height": 64}).raise_for_status().json()
        while not job["over"]:
            time.sleep(0.02)
            job = http.get(f"/octavo/jobs/{job['id']}").json()


def workflow(number: int) -> dict[str, Any]:
    """A prompt in ComfyUI's format."""
    sampling = {
        "seed": number, "steps": 1, "cfg": 4.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0,
        "model": ["4", 0], "positive": ["6", 0], "negative": ["7", 0], "latent_image": ["5", 0],
    }  # fmt: skip
    return {
        "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "octavo-demo.safetensors"}},
        "5": {"class_type": "EmptySD3LatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        "6": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["4", 1], "text": f"a red circle {number % 50}"}},
        "7": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["4", 1], "text": ""}},
        "3": {"class_type": "KSampler", "inputs": sampling},
        "8": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["4", 2]}},
        "9": {"class_type": "SaveImage", "inputs": {"images": ["8", 0], "filename_prefix": "leak"}},
    }


def measure(requests: int) -> dict[str, Any]:
    """Ask so often, and look now and then."""
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(Path(folder)) as (pid, url),
        httpx.Client(base_url=url, timeout=STARTING) as http,
        ThreadPoolExecutor(CLIENTS) as pool,
    ):
        start = time.monotonic()
        looks = {}
        for done in range(0, requests, BETWEEN):
            list(pool.map(lambda number: ask(http, number), range(done, min(done + BETWEEN, requests))))
            http.post("/free", json={"unload_models": True, "free_memory": True}).raise_for_status()
            looks[done + BETWEEN] = held(pid)
        seconds = time.monotonic() - start
        first = min(looks, key=lambda done: abs(done - requests // 4))
        before, after = looks[first], looks[max(looks)]
    growth = (after["bytes"] - before["bytes"]) / (requests - first)
    return {
        "name": "server_leak", "unit": "bytes/request", "value": round(growth), "requests": requests,
        "after_a_quarter": before, "at_the_end": after, "seconds": round(seconds, 1),
    }  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--requests", type=int, default=2000)
    print(json.dumps(measure(parser.parse_args().requests)))
