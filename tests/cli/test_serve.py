"""`octavo serve` as a process: quick to answer, clear when it cannot start, gone when told."""

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

COMMAND = [sys.executable, "-c", "from octavo.cli.main import main; main()", "serve"]


def environment() -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith("OCTAVO_")}
    return own | {"COLUMNS": "200", "OMP_NUM_THREADS": "1"}


def refused(tmp_path: Path, *words: str) -> str:
    done = subprocess.run(
        [*COMMAND, *words],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2, done
    assert "Traceback" not in done.stderr
    return done.stderr


@contextlib.contextmanager
def serving(tmp_path: Path, *words: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The running command, and its address once it has said it."""
    process = subprocess.Popen(
        [*COMMAND, "--port", "0", "--device", "cpu", *words],
        cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stderr is not None
        said = ""
        while not (found := re.search(r"(http://\S+?:\d+)/\s", said)):
            line = process.stderr.readline()
            assert line, said
            said += line
        yield process, found[1]
    finally:
        process.kill()
        process.communicate(timeout=20)


def asked(address: str, patience: float = 20.0) -> bytes:
    """What an address answers, once it does."""
    end = time.monotonic() + patience
    while True:
        try:
            with urllib.request.urlopen(address, timeout=patience) as answer:
                found: bytes = answer.read()
                return found
        except OSError:
            assert time.monotonic() < end, f"{address} does not answer"
            time.sleep(0.02)


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_it_tells_its_address_and_leaves_when_told(tmp_path: Path, sign: signal.Signals) -> None:
    with serving(tmp_path) as (process, address):
        assert json.loads(asked(address + "/health"))["status"] == "ok"
        process.send_signal(sign)
        out, rest = process.communicate(timeout=40)
        assert process.returncode == 0, rest
        assert "Traceback" not in out + rest


def test_what_cannot_be_is_said_and_ends_with_2(tmp_path: Path) -> None:
    assert "no model 'nope'" in refused(tmp_path, "--model", "nope")
    assert "--allow-anonymous" in refused(tmp_path, "--host", "0.0.0.0")
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = str(taken.getsockname()[1])
        assert "another program may have it" in refused(tmp_path, "--port", port)
    assert "no device" in refused(tmp_path, "--port", "0", "--device", "abacus").lower()


def test_keys_are_made_and_taken_away(tmp_path: Path) -> None:
    def done(*words: str) -> str:
        return subprocess.run(
            [*COMMAND, *words], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=60, check=True
        ).stdout.strip()

    key = done("--add-key", "alice")
    assert re.fullmatch(r"octavo-[\w-]{43}", key)
    assert key not in (tmp_path / "data" / "keys.json").read_text()
    done("--remove-key", "alice")
    assert json.loads((tmp_path / "data" / "keys.json").read_text()) == []


def test_help_and_settings_import_no_torch() -> None:
    code = (
        "import sys\nfrom octavo.cli.main import app\nimport octavo.cli.serve, octavo.server.run\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.slow
def test_killed_in_the_middle_nothing_is_lost_and_nothing_drawn_twice(tmp_path: Path) -> None:
    """Clients that send again with their key get their one picture, however often the server dies."""
    import random
    import threading

    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    address, clients = f"http://127.0.0.1:{port}", 12
    answers: dict[int, list[int]] = {}

    def client(number: int) -> None:
        body = {"prompt": "a red circle", "seed": number, "steps": 30, "width": 64, "height": 64}
        headers = {"Content-Type": "application/json", "Idempotency-Key": f"client-{number}"}
        request = urllib.request.Request(f"{address}/sdapi/v1/txt2img", json.dumps(body).encode(), headers)
        end = time.monotonic() + 120
        while number not in answers and time.monotonic() < end:
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    answers[number] = json.loads(json.load(answer)["info"])["all_seeds"]
            except urllib.error.HTTPError as refusal:
                # One that saw two deaths is not tried again, and says so; the others wait for the next start.
                if refusal.code == 422 and "2 times" in refusal.read().decode():
                    answers[number] = []
            except (OSError, http.client.HTTPException):
                time.sleep(0.05)

    threads = [threading.Thread(target=client, args=(number,), daemon=True) for number in range(clients)]
    for thread in threads:
        thread.start()
    for kill in range(3):
        with serving(tmp_path, "--port", str(port), "--workers", "3"):
            asked(address + "/sdapi/v1/samplers")
            time.sleep(random.uniform(0, 0.3) * (kill < 2))
            if kill == 2:
                for thread in threads:
                    thread.join(120)
    assert answers.keys() == set(range(clients))
    drawn = [number for number, seeds in answers.items() if seeds]
    assert all(answers[number] == [number] for number in drawn)
    assert len(drawn) > clients // 2
    files = sorted(path.name for path in (tmp_path / "output").iterdir())
    assert len(files) == len(drawn), files
