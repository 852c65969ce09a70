"""`octavo serve` as a process: quick to answer, clear when it cannot start, gone when told."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
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
