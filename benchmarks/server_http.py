"""`octavo serve` from outside, in a process of its own: how soon it answers, and what it does with many requests.

Requests go in by ComfyUI's API, as workflows, and their ends are heard on its websocket; run by `benchmarks.server`.
"""

import http.client
import json
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

from websockets.sync.client import ClientConnection, connect

from benchmarks.common import Timing, ratio, report
from benchmarks.server_engine import AHEAD, FP8, LONG, MIXED, PROMPTS, SHORT, mixed

SERVE = [sys.executable, "-c", "from octavo.cli.main import main; main()", "serve"]
CHECKPOINT = "octavo-demo.safetensors"
PATIENCE = 120.0  # seconds until something must have happened
ENDS = ("execution_success", "execution_error", "execution_interrupted")


class Server:
    """`octavo serve` on a free port, with folders of its own, and a client of it.

    Attributes:
        began: when its process was started.
        answered: seconds from there to its first answer.
    """

    def __init__(self, folder: Path, *options: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        folders = ["--data-dir", str(folder / "data"), "--output-dir", str(folder / "output"), "--device", "cpu"]
        self._log = (folder / "log.txt").open("w")
        self.began = perf_counter()
        self._process = subprocess.Popen(
            [*SERVE, "--port", str(self.port), *folders, *options], stdout=self._log, stderr=self._log
        )
        self.answered = self._until("/health")

    def ready(self) -> float:
        """Seconds from the start until its model is in memory."""
        return self._until("/ready")

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._log.close()

    def _until(self, path: str) -> float:
        while True:
            try:
                if self._status(path) == 200:
                    return perf_counter() - self.began
            except OSError:
                pass  # it does not listen yet
            if self._process.poll() is not None:
                raise RuntimeError(f"octavo serve ended: {Path(self._log.name).read_text()}")
            if perf_counter() - self.began > PATIENCE:
                raise TimeoutError(f"{path} has not answered 200 within {PATIENCE} s")
            time.sleep(0.01)

    def _status(self, path: str) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        try:
            connection.request("GET", path)
            return connection.getresponse().status
        finally:
            connection.close()


class Client:
    """Sends workflows and hears how they end."""

    def __init__(self, port: int) -> None:
        self.id = uuid.uuid4().hex
        self._http = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
        self._used = perf_counter()
        self._socket: ClientConnection = connect(f"ws://127.0.0.1:{port}/ws?clientId={self.id}", max_size=None)

    def send(self, workflow: dict[str, Any]) -> str:
        """Queue a workflow; returns its id."""
        answer = self._ask("/prompt", {"prompt": workflow, "client_id": self.id})
        return str(json.loads(answer)["prompt_id"])

    def ended(self, ids: Sequence[str]) -> dict[str, float]:
        """Wait until all of these have ended well; when each did, by `perf_counter`."""
        when: dict[str, float] = {}
        while set(ids) - when.keys():
            message = self._socket.recv(timeout=PATIENCE)
            if not isinstance(message, str):
                continue  # a preview
            told = json.loads(message)
            if told["type"] in ENDS and told["data"].get("prompt_id") in ids:
                if told["type"] != "execution_success":
                    raise RuntimeError(f"A workflow ended badly: {told}")
                when[told["data"]["prompt_id"]] = perf_counter()
        return when

    def cancel(self, ids: Sequence[str]) -> None:
        """Take back what waits, stop what runs, and wait until the server has nothing to do."""
        self._ask("/queue", {"delete": list(ids)})
        for each in ids:
            self._ask("/interrupt", {"prompt_id": each})
        while True:
            queue = json.loads(self._ask("/queue"))
            if not queue["queue_running"] and not queue["queue_pending"]:
                return
            time.sleep(0.02)

    def _ask(self, path: str, body: object = None) -> bytes:
        """POST where there is a body, else GET; the answer's body."""
        if perf_counter() - self._used > 2:  # the server closes a connection that is idle
            self._http.close()
        method, headers = ("GET", {}) if body is None else ("POST", {"Content-Type": "application/json"})
        self._http.request(method, path, None if body is None else json.dumps(body), headers)
        response = self._http.getresponse()
        answer = response.read()
        self._used = perf_counter()
        if response.status != 200:
            raise RuntimeError(f"{path} was refused: {answer.decode()}")
        return answer

    def close(self) -> None:
        """Leave."""
        self._socket.close()
        self._http.close()


def measure_http(repeats: int) -> None:
    """Print a line for each figure."""
    _start(repeats)
    with _serving() as client:
        _cached(client, repeats)
        _throughput(client, repeats)
        _throughput(client, repeats, unet=FP8)
        in_company = _waits(client, repeats)
    with _serving("--workers", "1") as client:
        in_order = _waits(client, repeats)
    conditions = {"steps": SHORT, "ahead": AHEAD, "their_steps": LONG}
    report("server_short_wait", "s", in_company, what="a short request behind long ones", **conditions)
    report("server_short_wait_in_order", "s", in_order, what="first come, first served", **conditions)
    share = in_company.p95 / in_order.p95
    report("server_short_wait_share", "times", share, what="p95 over p95 of first come, first served", **conditions)


def _start(repeats: int) -> None:
    """From the command to the first answer, to the model in memory, and to the first picture."""
    answers, readies, pictures = [], [], []
    for number in range(1 + repeats):  # the first brings the files into the page cache
        with tempfile.TemporaryDirectory() as folder:
            server = Server(Path(folder))
            try:
                ready = server.ready()
                client = Client(server.port)
                id = client.send(workflow(PROMPTS[0], "euler", 20, seed=1))
                picture = client.ended([id])[id] - server.began
                client.close()
            finally:
                server.close()
        if number:
            answers.append(server.answered)
            readies.append(ready)
            pictures.append(picture)
    report("server_first_answer", "s", Timing(tuple(answers)), what="from the command to the first answer")
    report("server_ready", "s", Timing(tuple(readies)), what="from the command to the model in memory")
    report("server_first_picture", "s", Timing(tuple(pictures)), what="from the command to the first picture, 20 steps")


def _cached(client: Client, repeats: int) -> None:
    """A workflow that was drawn before: nothing is to be done, and that is to be found out."""
    again = workflow(PROMPTS[0], "euler", 20, seed=7)
    client.ended([client.send(again)])
    seconds = []
    for _ in range(10 * repeats):
        begin = perf_counter()
        id = client.send(again)
        seconds.append((client.ended([id])[id] - begin) * 1e3)
    report("server_cached_workflow", "ms", Timing(tuple(seconds)), what="POST /prompt to execution_success")


def _throughput(client: Client, repeats: int, unet: str | None = None) -> None:
    """Mixed requests one after the other, and all at once; other seeds every time, so that nothing is cached."""
    one_by_one, at_once = [], []
    for round in range(1 + repeats):  # the first is not counted: it brings the texts into their cache
        begin = perf_counter()
        for each in _mixed(1000 * round, unet):
            client.ended([client.send(each)])
        middle = perf_counter()
        client.ended([client.send(each) for each in _mixed(1000 * round + 500, unet)])
        if round:
            one_by_one.append(middle - begin)
            at_once.append(perf_counter() - middle)
    alone, together = Timing(tuple(one_by_one)), Timing(tuple(at_once))
    told = {"requests": MIXED, "model": CHECKPOINT if unet is None else unet}
    report("server_mixed_one_by_one", "s", alone, **told)
    report("server_mixed_at_once", "s", together, **told)
    gain = ratio(alone, together)
    report("server_mixed_throughput", "times", gain, what="at once over one by one", **told)


def _waits(client: Client, repeats: int) -> Timing:
    """Seconds from the short request's POST to its end, ten long ones having been sent before."""
    seconds = []
    for round in range(repeats):
        long = [
            client.send(workflow(PROMPTS[i % 4], "euler", LONG, seed=10_000 * (1 + round) + i)) for i in range(AHEAD)
        ]
        begin = perf_counter()
        short = client.send(workflow(PROMPTS[0], "euler", SHORT, seed=10_000 * (1 + round) + 99))
        seconds.append(client.ended([short])[short] - begin)
        client.cancel(long)
    return Timing(tuple(seconds))


def _mixed(seed: int, unet: str | None) -> list[dict[str, Any]]:
    return [
        workflow(request.prompt, str(request.sampler), request.steps or 20, seed=seed + i, unet=unet)
        for i, request in enumerate(mixed())
    ]


def workflow(prompt: str, sampler: str, steps: int, *, seed: int, unet: str | None = None) -> dict[str, Any]:
    """A picture of 128x128 px by the embedded model, in ComfyUI's API format.

    Args:
        unet: a file of diffusion_models/ that draws in the place of the checkpoint's own.
    """
    loader = {"8": {"class_type": "UNETLoader", "inputs": {"unet_name": unet, "weight_dtype": "default"}}}
    return {
        **({} if unet is None else loader),
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": CHECKPOINT}},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"text": prompt, "clip": ["1", 1]}},
        "3": {"class_type": "CLIPTextEncode", "inputs": {"text": "", "clip": ["1", 1]}},
        "4": {"class_type": "EmptySD3LatentImage", "inputs": {"width": 128, "height": 128, "batch_size": 1}},
        "5": {
            "class_type": "KSampler",
            "inputs": {
                "model": ["1" if unet is None else "8", 0],
                "positive": ["2", 0],
                "negative": ["3", 0],
                "latent_image": ["4", 0],
                "seed": seed,
                "steps": steps,
                "cfg": 4.0,
                "sampler_name": sampler,
                "scheduler": "simple",
                "denoise": 1.0,
            },
        },
        "6": {"class_type": "VAEDecode", "inputs": {"samples": ["5", 0], "vae": ["1", 2]}},
        "7": {"class_type": "SaveImage", "inputs": {"images": ["6", 0], "filename_prefix": "bench"}},
    }


@contextmanager
def _serving(*options: str) -> Iterator[Client]:
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder), *options)
        try:
            server.ready()
            client = Client(server.port)
            client.ended([client.send(workflow(PROMPTS[0], "euler", 4, seed=0))])
            yield client
            client.close()
        finally:
            server.close()
