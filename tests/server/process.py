"""A real `octavo serve` in a process of its own, to be crowded, killed and attacked; what its files say afterwards."""

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.server.conftest import PATIENCE, until

STARTING = 240.0  # seconds that a start may take on a busy machine; an idle one needs three


@dataclass
class Process:
    """One server process on a folder that outlives it."""

    folder: Path
    popen: "subprocess.Popen[bytes]"
    log: Path

    @property
    def pid(self) -> int:
        return self.popen.pid

    @property
    def url(self) -> str:
        found = re.search(r"http://127\.0\.0\.1:\d+", self.said())
        assert found is not None, self.said()
        return found[0]

    def said(self) -> str:
        """All that it wrote."""
        return self.log.read_text("utf-8", "replace")

    def until_it_answers(self) -> "Process":
        """Wait until it accepts connections."""

        def answers() -> bool:
            assert self.popen.poll() is None, self.said()
            if "http://127.0.0.1:" not in self.said():
                return False
            try:
                return httpx.get(f"{self.url}/health", timeout=5).status_code == 200
            except httpx.TransportError:
                return False

        until(answers, "the server answers", STARTING)
        return self

    def until_ready(self) -> "Process":
        """Wait until its model is loaded."""
        self.until_it_answers()
        until(lambda: httpx.get(f"{self.url}/ready", timeout=5).status_code == 200, "the model is loaded", STARTING)
        return self

    def kill(self) -> None:
        """No warning, no chance to put anything in order."""
        self.popen.send_signal(signal.SIGKILL)
        self.popen.wait(PATIENCE)

    def files(self) -> int:
        """Open files and sockets."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def threads(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/task"))

    def resident(self) -> int:
        """Bytes of memory."""
        pages = Path(f"/proc/{self.pid}/statm").read_text("ascii").split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")


def start(folder: Path, *options: str) -> Process:
    """Start a server whose files are all in `folder`; it is not waited for."""
    folder.mkdir(exist_ok=True)
    log = folder / f"log-{time.monotonic_ns()}"
    command = [
        sys.executable,
        "-c",
        "from octavo.cli.main import main; main()",
        "serve",
        "--port",
        "0",
        "--device",
        "cpu",
    ]
    places = ["--data-dir", str(folder / "data"), "--output-dir", str(folder / "out")]
    own = {name: value for name, value in os.environ.items() if not name.startswith("OCTAVO_")}
    quiet = {"OMP_NUM_THREADS": "1", "COLUMNS": "200", "PYTHONUNBUFFERED": "1"}
    with log.open("wb") as output:
        popen = subprocess.Popen(
            [*command, *places, *options], stdout=output, stderr=output, cwd=folder, env=own | quiet
        )
    return Process(folder, popen, log)


@contextmanager
def serving(folder: Path, *options: str) -> Iterator[Process]:
    """A server that is ready, and gone afterwards."""
    process = start(folder, *options)
    try:
        yield process.until_ready()
    finally:
        process.popen.terminate()
        try:
            process.popen.wait(PATIENCE)
        finally:
            process.popen.kill()


def jobs_in(folder: Path) -> dict[str, dict[str, Any]]:
    """Every job in the queue's file, by id."""
    with closing(sqlite3.connect(f"file:{folder}/data/queue.sqlite3?mode=ro", uri=True)) as db:
        db.row_factory = sqlite3.Row
        rows = [dict(row) for row in db.execute("SELECT * FROM jobs")]
    for row in rows:
        for name in ("payload", "result", "error"):
            row[name] = None if row[name] is None else json.loads(row[name])
    return {row["id"]: row for row in rows}


def files_of(job: Mapping[str, Any]) -> list[str]:
    """The files that a job's result names, within the output folder."""
    result = job["result"] or {}
    drawn = [picture["path"] for picture in result.get("pictures", ())]
    shown = [
        "/".join(filter(None, (each["subfolder"], each["filename"])))
        for output in result.get("outputs", {}).values()
        for each in output.get("images", ())
        if each["type"] == "output"
    ]
    return drawn + shown


def files_in(folder: Path) -> list[str]:
    """The files in the output folder."""
    out = folder / "out"
    return [path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()]


def workflow(text: str = "a red circle", *, seed: int = 1, steps: int = 2, size: int = 64, name: str = "x") -> Any:
    """A prompt in ComfyUI's format that draws and saves one picture with the embedded model."""
    return {
        "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "octavo-demo.safetensors"}},
        "5": {"class_type": "EmptySD3LatentImage", "inputs": {"width": size, "height": size, "batch_size": 1}},
        "6": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["4", 1], "text": text}},
        "7": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["4", 1], "text": ""}},
        "3": {
            "class_type": "KSampler",
            "inputs": {
                "model": ["4", 0], "positive": ["6", 0], "negative": ["7", 0], "latent_image": ["5", 0], "seed": seed,
                "steps": steps, "cfg": 4.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0,
            },
        },
        "8": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["4", 2]}},
        "9": {"class_type": "SaveImage", "inputs": {"images": ["8", 0], "filename_prefix": name}},
    }  # fmt: skip
