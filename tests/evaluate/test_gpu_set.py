"""The GPU set, rehearsed on the CPU: what sections find is kept, whatever becomes of them."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_checks
from benchmarks.gpu import Section
from octavo.evaluate.bench import SUITES
from octavo.evaluate.bench_models import EMBEDDED, Wanted
from octavo.evaluate.bench_results import Results
from octavo.evaluate.bench_timing import Deadline

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


def rehearsed(out: Path, *only: str) -> tuple[dict[str, object], dict[str, object]]:
    command = [sys.executable, "-m", "benchmarks.gpu", "--cpu-rehearsal", "--out", str(out), "--only", *only]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads((out / "gpu.json").read_text("utf-8")), json.loads(done.stdout.splitlines()[-1])


def test_the_rehearsal_runs_end_to_end_and_outlives_what_breaks(tmp_path: Path) -> None:
    page, summary = rehearsed(tmp_path, "checks", "broken", "hanging")
    sections = {each["name"]: each for each in page["sections"]}  # type: ignore[attr-defined]
    assert sections["checks"]["exit"] == 0
    assert page["errors"] == []
    assert sections["broken"]["exit"] == 1
    assert "as a kernel may fail" in sections["broken"]["tail"]
    assert sections["hanging"]["timed_out"]
    assert summary["sections_failed"] == ["broken", "hanging"]
    assert summary["checks"] > 30  # type: ignore[operator]
    assert summary["checks_failed"] == []
    names = {line["name"] for line in page["lines"]}  # type: ignore[attr-defined]
    assert {"check.step.streamed.0_of_3", "check.loading.nan_is_found", "check.picture.usual"} <= names
    assert (tmp_path / "gpu.svg").read_text("utf-8").startswith("<svg")
    assert "===== hanging" in (tmp_path / "gpu.log").read_text("utf-8")


def test_what_a_killed_section_had_found_is_kept(tmp_path: Path) -> None:
    line = json.dumps({"line": {"name": "a"}})
    script = f"import sys, time; open(sys.argv[1] + '/bench.jsonl', 'w').write({line!r}); time.sleep(60)"
    section = Section("slow", (sys.executable, "-c", script, "{out}"), 1.5)
    found = gpu.run(section, tmp_path, left=100)
    assert found["timed_out"]
    assert found["lines"] == [{"name": "a"}]
    assert 1.5 <= found["seconds"] < 20


def test_no_section_is_begun_when_the_time_is_up(tmp_path: Path) -> None:
    command = ["--cpu-rehearsal", "--out", str(tmp_path), "--minutes", "0.01"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *command], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout.splitlines()[-1])["sections"] == 0
    assert "checks" in json.loads((tmp_path / "gpu.json").read_text("utf-8"))["skipped"]


def test_sections_name_what_exists_and_the_most_valuable_fit_into_the_time() -> None:
    sections = list(gpu.sections())
    assert len({section.name for section in sections}) == len(sections)
    for section in sections:
        if "-m" in section.command and (module := section.command[section.command.index("-m") + 1]) != "pytest":
            assert importlib.util.find_spec(module) is not None, module
        asked = [word for word, after in zip(section.command[1:], section.command, strict=False) if after == "--suite"]
        assert set(asked) <= set(SUITES)
    assert sum(section.seconds for section in sections[:6]) < 60 * gpu.MINUTES
    assert all((ROOT / path).exists() for path in gpu.GPU_TESTS)


def test_a_check_beyond_its_bound_is_an_error_and_nan_never_passes() -> None:
    for error in (0.2, float("nan")):
        results = Results(CPU)
        checks = gpu_checks.Checks(Wanted(model=EMBEDDED, device=CPU, dtype=torch.float32), 64, results, Deadline())
        with results.guarded("outer"):
            checks.held("thing", error, 0.1)
        assert results.lines[0]["conditions"]["ok"] is False
        assert results.errors[0]["name"] == "outer"
        page = {"lines": results.lines, "sections": [], "errors": results.errors, "device": "x", "seconds": 1}
        assert gpu.summary(page)["checks_failed"] == ["check.thing"]


@pytest.mark.parametrize("check", ["products", "attending"])
def test_a_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch, check: str) -> None:
    """Swap two rows of every result: all bounds are broken."""
    results = Results(CPU)
    wanted = Wanted(model=EMBEDDED, device=CPU, dtype=torch.float32)
    monkeypatch.setattr(gpu_checks, "distance", lambda y, exact: float((y.flip(0) - exact).norm() / exact.norm()))
    with torch.inference_mode():
        if check == "attending":  # one row alone cannot be swapped
            monkeypatch.setattr(
                gpu_checks, "distance", lambda y, exact: float((y.flip(1) - exact).norm() / exact.norm())
            )
        getattr(gpu_checks, check)(gpu_checks.Checks(wanted, 64, results, Deadline()))
    assert results.lines
    assert not any(line["conditions"]["ok"] for line in results.lines)
