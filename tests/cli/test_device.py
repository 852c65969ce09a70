"""`octavo info --device`: every way to multiply, usable or with the reason why not."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from octavo.cli import main as cli
from octavo.fp8 import BACKENDS
from octavo.fp8 import survey as fp8_survey
from octavo.fp8.survey import SHAPES, Shape
from octavo.placement.attention import ATTENTION_BACKENDS

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    monkeypatch.setenv("OCTAVO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "250")

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["octavo", "info", *words])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        code = exit_.value.code
        return (code if isinstance(code, int) else 0, *capsys.readouterr())

    return run


@pytest.mark.parametrize("words", [["--device", "cpu"], ["--device=cpu", "--dtype", "bf16"]], ids=str)
def test_every_backend_is_told_with_what_it_needs_or_why_it_is_of_no_use(run: Run, words: list[str]) -> None:
    code, out, _ = run(*words)
    assert code == 0
    for backend in BACKENDS:
        assert f"\n{backend.name} " in out
    assert "torch: runs on cuda, this is cpu." in out
    assert "steps between products one by one: a fused one runs on cuda, this is cpu" in out
    assert "compute capability 8.9" in out
    assert "cores" in out
    assert "computes in float32 unless told otherwise" in out


def test_without_a_name_the_fastest_device_is_told(run: Run) -> None:
    for words in (["--device", "--json"], ["--json", "--device"]):
        code, out, _ = run(*words)
        page = json.loads(out)
        assert code == 0
        assert page["device"] in {"cpu", "cuda:0", "mps"}
        assert {backend["name"] for backend in page["backends"]} == {backend.name for backend in BACKENDS}
        assert sum("exact" in backend["chosen"] for backend in page["backends"]) == 1


def test_times_are_measured_when_asked_and_kept(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys.modules["octavo.fp8.survey"], "SHAPES", (*[Shape("small", 4, 32, 16)] * 2,))
    code, out, _ = run("--device", "cpu", "--measure", "--json")
    assert code == 0
    page = json.loads(out)
    assert page["backends"][-1]["name"] == "F.linear in float32"
    times = {backend["name"]: backend["milliseconds"] for backend in page["backends"]}
    assert all(time > 0 for name in ("plain", "cpu-blas", "plain-w8a8") for time in times[name])
    assert times["torch"] == [None, None]
    assert (tmp_path / "cache" / "fp8-times.json").exists()
    _, out, _ = run("--device", "cpu", "--measure")
    assert "F.linear in float32" in out
    assert "milliseconds" in out


def test_shapes_are_those_of_the_released_models() -> None:
    assert {shape.K for shape in SHAPES} | {shape.N for shape in SHAPES} == {1536, 4608, 6144, 9216, 4096, 10240}
    assert callable(fp8_survey)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "octavo info --device"),
        (["--device", "cdua"], "Did you mean 'cuda'"),
        (["--device", "cpu", "--dtype", "fp8"], "There is no dtype"),
    ],
)
def test_what_cannot_be_told_is_said(run: Run, words: list[str], message: str) -> None:
    code, _, err = run(*words)
    assert code == 2
    assert message in err


def test_every_way_to_attend_is_told_with_its_error_or_why_it_is_of_no_use(run: Run) -> None:
    _, out, _ = run("--device", "cpu")
    for way in ATTENTION_BACKENDS:
        assert f"\n{way.name} " in out
    assert "triton-fp8: runs on cuda, this is cpu." in out
    assert "--graphs: not here: CUDA graphs need a CUDA device, this is cpu." in out
    assert "--compile: " in out
    _, out, _ = run("--device", "cpu", "--json")
    ways = {way["name"]: way for way in json.loads(out)["attention"]}
    assert set(ways) == {way.name for way in ATTENTION_BACKENDS}
    assert ways["sdpa"]["chosen"] == ["exact", "fast"]
    assert ways["triton-fp8"]["fast"] == "runs on cuda, this is cpu"
    assert all(way["milliseconds"] is None for way in ways.values())
