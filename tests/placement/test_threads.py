"""How many threads: the user's word, the environment's, a trial's; never more than the container may keep busy."""

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from octavo.errors import RequestError
from octavo.placement import threads
from octavo.placement.threads import Threads, cpu_quota, pick_threads, use_threads


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight cores of which pairs share a unit, all allowed; torch takes four; an empty cache."""
    monkeypatch.setenv("OCTAVO_CACHE", str(tmp_path))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.setattr(threads, "allowed_cores", lambda: 8)
    monkeypatch.setattr(threads, "physical_cores", lambda: 4)
    monkeypatch.setattr(threads, "active_count", lambda: 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)


def trial(monkeypatch: pytest.MonkeyPatch, found: int) -> list[list[int]]:
    """Trials find so many to be the fastest; returns what was tried."""
    tried: list[list[int]] = []

    def fastest(counts: Sequence[int]) -> int:
        tried.append(list(counts))
        return found

    monkeypatch.setattr(threads, "_fastest", fastest)
    return tried


def test_the_user_s_word_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert pick_threads(2, measure=True).count == 2


@pytest.mark.parametrize("count", [0, -1, 33])
def test_a_number_that_cannot_help_is_refused_with_the_range(count: int) -> None:
    with pytest.raises(RequestError, match=r"choose 1 to 32 on this machine of 8 cores"):
        pick_threads(count)


def test_the_environment_s_word_needs_no_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = trial(monkeypatch, 8)
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert pick_threads(measure=True) == Threads(count=4, why="by OMP_NUM_THREADS")
    assert tried == []


def test_a_trial_is_made_once_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = trial(monkeypatch, 8)
    assert pick_threads().count == 4, "small models are not worth a trial"
    assert tried == []
    assert pick_threads(measure=True).count == 8
    assert pick_threads(measure=True).count == pick_threads().count == 8
    assert tried == [[4, 8]]


def test_a_broken_record_is_as_good_as_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tried = trial(monkeypatch, 8)
    for content in ("[1]", "nonsense", '{"x": "y"}'):
        (tmp_path / threads.FILE).write_text(content)
        assert pick_threads(measure=True).count == 8
    assert len(tried) == 3


def test_other_threads_are_not_disturbed(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = trial(monkeypatch, 8)
    monkeypatch.setattr(threads, "active_count", lambda: 2)
    picked = pick_threads(measure=True)
    assert picked.count == 4
    assert "other threads" in picked.why
    assert tried == []


def test_a_container_s_share_is_never_exceeded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "allowed_cores", lambda: 2)
    tried = trial(monkeypatch, 8)
    assert pick_threads(measure=True) == Threads(count=2, why="one for each core allowed here")
    assert tried == []


def test_the_number_is_torch_s_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    use_threads(Threads(count=4, why="as it is"))
    use_threads(Threads(count=2, why="fewer"))
    assert given == [2]


def test_a_trial_leaves_the_number_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    assert threads._fastest([1, 2]) in (1, 2)
    assert {1, 2} <= set(given)
    assert given[-1] == 4


def groups(tmp_path: Path, line: str) -> Path:
    path = tmp_path / "cgroup"
    path.write_text(line + "\n")
    return path


@pytest.mark.parametrize(("held", "quota"), [("150000 100000", 1.5), ("max 100000", None), ("nonsense", None)])
def test_quotas_of_control_groups_are_read(tmp_path: Path, held: str, quota: float | None) -> None:
    (tmp_path / "pod" / "own").mkdir(parents=True)
    (tmp_path / "pod" / "own" / "cpu.max").write_text(held)
    assert cpu_quota(tmp_path, groups(tmp_path, "0::/pod/own")) == quota


def test_the_smallest_quota_of_the_groups_around_counts(tmp_path: Path) -> None:
    (tmp_path / "pod" / "own").mkdir(parents=True)
    (tmp_path / "pod" / "own" / "cpu.max").write_text("800000 100000")
    (tmp_path / "pod" / "cpu.max").write_text("300000 100000")
    assert cpu_quota(tmp_path, groups(tmp_path, "0::/pod/own")) == 3
    assert cpu_quota(tmp_path, groups(tmp_path, "0::/not/mounted/here")) is None


def test_quotas_of_the_old_kind_are_read(tmp_path: Path) -> None:
    (tmp_path / "cpu" / "own").mkdir(parents=True)
    (tmp_path / "cpu" / "own" / "cpu.cfs_quota_us").write_text("250000")
    (tmp_path / "cpu" / "own" / "cpu.cfs_period_us").write_text("100000")
    lines = "5:memory:/own\n4:cpu,cpuacct:/own"
    assert cpu_quota(tmp_path, groups(tmp_path, lines)) == 2.5
    (tmp_path / "cpu" / "own" / "cpu.cfs_quota_us").write_text("-1")
    assert cpu_quota(tmp_path, groups(tmp_path, lines)) is None


def test_a_system_without_control_groups_sets_no_quota(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path, tmp_path / "none") is None


def test_what_this_machine_says_makes_sense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    quota = cpu_quota()
    assert quota is None or quota > 0
    assert 1 <= threads.physical_cores() <= (os.cpu_count() or 1)
    assert 1 <= threads.allowed_cores() <= (os.cpu_count() or 1)


@pytest.mark.parametrize(
    ("device", "lean", "kept"), [("cpu", False, True), ("cpu", True, False), ("cuda", False, False)]
)
def test_a_step_leaves_its_memory_to_the_next_on_a_cpu_unless_work_is_to_be_small(
    device: str, lean: bool, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = list[bool]()
    monkeypatch.setattr(threads, "keep_freed_memory", lambda: called.append(True))
    threads.take_threads(None, torch.device(device), lean=lean)
    assert bool(called) is kept
