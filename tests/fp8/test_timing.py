"""Measured times are kept from process to process, and a broken file costs nothing but the time."""

import json
from pathlib import Path

import pytest
import torch

from octavo.fp8 import E4M3FN, Problem
from octavo.fp8.backends import Backend, UnusableError
from octavo.fp8.matmul import PLAIN, plain_matmul
from octavo.fp8.timing import FILE, Timings, cache_folder, seconds

PROBLEM = Problem(N=16, K=16, format=E4M3FN, granularity="row", dtype=torch.float32, device="cpu", rows=4)


class Clock:
    """Gives 1, 2, 3, … seconds."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, _backend: Backend, _problem: Problem) -> float:
        self.calls += 1
        return float(self.calls)


def test_a_second_process_measures_nothing() -> None:
    clock = Clock()
    first = Timings(clock)
    assert [first(PLAIN, PROBLEM), first(PLAIN, PROBLEM)] == [1.0, 1.0]
    first.save()
    assert Timings(clock)(PLAIN, PROBLEM) == 1.0
    assert clock.calls == 1


def test_other_threads_shapes_and_backends_are_measured_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    timings = Timings(clock)
    timings(PLAIN, PROBLEM)
    assert timings(Backend(name="other", run=plain_matmul), PROBLEM) == 2.0
    for field, value in {"N": 32, "K": 32, "rows": 5, "dtype": torch.bfloat16, "granularity": "tensor"}.items():
        values = {name: getattr(PROBLEM, name) for name in PROBLEM.__slots__} | {field: value}
        timings(PLAIN, Problem(**values))
    assert clock.calls == 7
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    assert timings(PLAIN, PROBLEM) == 8.0


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        '{"form": 1}',
        '{"form": 2, "seconds": {}}',
        '{"form": 1, "seconds": {"a": {"b": {"c": "d"}}}}',
        "\0",
    ],
)
def test_a_broken_file_is_made_again(content: str) -> None:
    path = cache_folder() / FILE
    path.parent.mkdir(parents=True)
    path.write_text(content)
    timings = Timings(Clock())
    assert timings(PLAIN, PROBLEM) == 1.0
    timings.save()
    assert json.loads(path.read_text())["form"] == 1
    assert [file.name for file in path.parent.iterdir()] == [FILE]  # nothing half-written lies about


def test_two_processes_add_to_one_file() -> None:
    first, second = Timings(Clock()), Timings(Clock())
    first(PLAIN, PROBLEM)
    second(Backend(name="other", run=plain_matmul), PROBLEM)
    first.save()
    second.save()
    (shapes,) = json.loads((cache_folder() / FILE).read_text())["seconds"].values()
    assert list(shapes.values()) == [{"plain": 1.0, "other": 1.0}]


def test_a_folder_that_cannot_be_written_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("OCTAVO_CACHE", str(tmp_path / "file" / "cache"))
    timings = Timings(Clock())
    timings(PLAIN, PROBLEM)
    timings.save()


def test_the_folder_is_where_the_desktop_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OCTAVO_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/octavo")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "octavo"


def test_what_fails_is_said_and_what_works_takes_time() -> None:
    def fails(*_: object) -> torch.Tensor:
        raise RuntimeError("no kernel image\nmore")

    assert 0 < seconds(PLAIN, PROBLEM) < 10
    with pytest.raises(UnusableError, match=r"^fails when tried: no kernel image$"):
        seconds(Backend(name="fails", run=fails), PROBLEM)
