"""Writing that is interrupted goes on where it stopped, and ends in the very file that one go would have given."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from torch import Tensor

from octavo.checkpoint.resume import ResumableWriter
from octavo.checkpoint.save import save_safetensors
from octavo.errors import CheckpointError, CorruptFileError, RequestError

TENSORS: dict[str, Tensor] = {
    f"layer{i}": torch.randn(5 + i, 7, generator=torch.Generator().manual_seed(i)).to(dtype)
    for i, dtype in enumerate([torch.float32, torch.float16, torch.float8_e4m3fn, torch.bfloat16, torch.uint8])
}
LAYOUT = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()}
HEADER = {"octavo.recipe": 'name = "row"'}


@pytest.fixture
def expected(tmp_path: Path) -> bytes:
    save_safetensors(tmp_path / "expected" / "a.safetensors", TENSORS, HEADER)
    return (tmp_path / "expected" / "a.safetensors").read_bytes()


def write_until(path: Path, count: int, end: BaseException) -> None:
    with ResumableWriter(path, LAYOUT, HEADER) as writer:
        for name in list(TENSORS)[:count]:
            writer.write(name, TENSORS[name])
        raise end


def names_in(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir() if file.is_file())


def go_on(path: Path) -> frozenset[str]:
    """Write what is missing; returns what was not."""
    with ResumableWriter(path, LAYOUT, HEADER) as writer:
        for name, tensor in TENSORS.items():
            if name not in writer.done:
                writer.write(name, tensor)
    return writer.done


@pytest.mark.parametrize("count", range(len(TENSORS) + 1))
def test_an_interrupted_file_goes_on_to_the_same_bytes(tmp_path: Path, expected: bytes, count: int) -> None:
    path = tmp_path / "a.safetensors"
    with pytest.raises(KeyboardInterrupt):
        write_until(path, count, KeyboardInterrupt())
    assert names_in(tmp_path) == ["a.safetensors.part", "a.safetensors.part.journal"]
    assert go_on(path) == set(list(TENSORS)[:count])
    assert path.read_bytes() == expected
    assert names_in(tmp_path) == ["a.safetensors"]


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.checkpoint.test_resume import HEADER, LAYOUT, TENSORS
from octavo.checkpoint.resume import ResumableWriter
with ResumableWriter(Path(sys.argv[1]), LAYOUT, HEADER) as writer:
    writer.write("layer0", TENSORS["layer0"])
    writer.write("layer1", TENSORS["layer1"])
    writer.commit()
    writer.write("layer2", TENSORS["layer2"])  # never reaches the journal
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
def test_a_killed_process_leaves_what_a_later_one_goes_on_with(tmp_path: Path, expected: bytes) -> None:
    path = tmp_path / "a.safetensors"
    root = Path(__file__).resolve().parents[2]
    killed = subprocess.run([sys.executable, "-c", KILLED, str(path)], cwd=root, env={**os.environ, "PYTHONPATH": "."})
    assert killed.returncode == -signal.SIGKILL
    assert not path.exists()
    assert go_on(path) == {"layer0", "layer1"}
    assert path.read_bytes() == expected
    assert names_in(tmp_path) == ["a.safetensors"]


def test_a_line_of_the_journal_that_was_cut_off_counts_for_nothing(tmp_path: Path, expected: bytes) -> None:
    path = tmp_path / "a.safetensors"
    with pytest.raises(KeyboardInterrupt):
        write_until(path, 3, KeyboardInterrupt())
    journal = tmp_path / "a.safetensors.part.journal"
    journal.write_bytes(journal.read_bytes()[:-5])
    assert go_on(path) == frozenset()
    assert path.read_bytes() == expected


@pytest.mark.parametrize(
    ("layout", "header"),
    [
        pytest.param(LAYOUT, {"octavo.recipe": 'name = "best"'}, id="another recipe"),
        pytest.param({name: LAYOUT[name] for name in list(LAYOUT)[1:]}, HEADER, id="another layout"),
    ],
)
def test_the_part_of_another_job_is_thrown_away(tmp_path: Path, layout: dict, header: dict) -> None:  # type: ignore[type-arg]
    path = tmp_path / "a.safetensors"
    with pytest.raises(KeyboardInterrupt):
        write_until(path, 3, KeyboardInterrupt())
    with ResumableWriter(path, layout, header) as writer:
        assert (writer.done, writer.restarted) == (frozenset(), True)
        for name in layout:
            writer.write(name, TENSORS[name])
    save_safetensors(tmp_path / "b.safetensors", {name: TENSORS[name] for name in layout}, header)
    assert path.read_bytes() == (tmp_path / "b.safetensors").read_bytes()


@pytest.mark.parametrize(
    "journal",
    [b"", b"no JSON\n", b"[]\n", b'{"job": "another"}\n', b'{"job": 1}\n{"written": 3}\n', None],
    ids=["empty", "not JSON", "a list", "of another job", "not a list of names", "gone"],
)
def test_a_part_without_a_sound_journal_is_made_anew(tmp_path: Path, expected: bytes, journal: bytes | None) -> None:
    path = tmp_path / "a.safetensors"
    with pytest.raises(KeyboardInterrupt):
        write_until(path, 3, KeyboardInterrupt())
    place = tmp_path / "a.safetensors.part.journal"
    place.unlink() if journal is None else place.write_bytes(journal)
    assert go_on(path) == frozenset()
    assert path.read_bytes() == expected


def test_a_journal_does_not_vouch_for_a_part_that_was_exchanged(tmp_path: Path, expected: bytes) -> None:
    path = tmp_path / "a.safetensors"
    with pytest.raises(KeyboardInterrupt):
        write_until(path, 3, KeyboardInterrupt())
    (tmp_path / "a.safetensors.part").write_bytes(b"something else")
    assert go_on(path) == frozenset()
    assert path.read_bytes() == expected


def test_a_job_that_cannot_succeed_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_text("old")
    with pytest.raises(CorruptFileError):
        write_until(tmp_path / "a.safetensors", 3, CorruptFileError("NaN"))
    assert names_in(tmp_path) == ["a.safetensors"]
    assert (tmp_path / "a.safetensors").read_text() == "old"


def test_a_full_disk_costs_no_work(tmp_path: Path, expected: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written before the disk was full stays, and the error says what to do."""
    path = tmp_path / "a.safetensors"

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    def fill_the_disk() -> None:
        with ResumableWriter(path, LAYOUT, HEADER) as writer:
            writer.write("layer0", TENSORS["layer0"])
            writer.commit()
            writer.write("layer1", TENSORS["layer1"])
            monkeypatch.setattr(os, "fsync", full)
            writer.commit()

    with pytest.raises(CheckpointError, match="No space left on device"):
        fill_the_disk()
    monkeypatch.undo()
    assert go_on(path) == {"layer0"}
    assert path.read_bytes() == expected


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with (
        FileLock(tmp_path / "a.safetensors.part.lock"),
        pytest.raises(RequestError, match="Another process is writing"),
    ):
        ResumableWriter(path, LAYOUT, HEADER)
    go_on(path)
    assert path.exists()


def test_a_file_larger_than_the_disk_is_refused_before_a_byte_is_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"needs .* GB, but its disk has"):
        ResumableWriter(tmp_path / "a.safetensors", {"x": (torch.float32, (2**30, 2**20))})
    assert names_in(tmp_path) == []


def test_the_journal_names_a_tensor_only_when_it_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the moment of each fsync of the part, its new tensors are not in the journal yet."""
    seen: list[list[str]] = []
    sync = os.fsync
    journal = tmp_path / "a.safetensors.part.journal"

    def watched(file: int) -> None:
        if os.path.samestat(os.fstat(file), (tmp_path / "a.safetensors.part").stat()) and journal.exists():
            lines = [json.loads(line) for line in journal.read_bytes().splitlines()]
            seen.append([name for line in lines for name in line.get("written", [])])
        sync(file)

    monkeypatch.setattr(os, "fsync", watched)
    with ResumableWriter(tmp_path / "a.safetensors", LAYOUT, HEADER) as writer:
        for name, tensor in TENSORS.items():
            writer.write(name, tensor)
            writer.commit()
    # The last time is that of the finished file, before it is moved to its place.
    assert seen == [list(TENSORS)[:count] for count in (*range(len(TENSORS)), len(TENSORS))]
