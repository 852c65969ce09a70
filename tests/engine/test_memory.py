"""Too little memory, injected: smaller turns, single rows, relief, tiles, at last one clear failure; the rest lives."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from octavo import load
from octavo.engine.batch import Batcher
from octavo.engine.metrics import Metrics
from octavo.engine.policy import PATIENCE
from octavo.errors import OutOfMemoryError
from octavo.pipeline.decode import TILE, decode, decode_as_fits
from octavo.pipeline.run import Step, solve
from tests.engine.fake_model import FakeModel, Loaded, a_run
from tests.tiny_tree import write_tiny_tree

WAIT = 30.0  # seconds until a test gives up
ERRORS: tuple[Exception, ...] = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    MemoryError(),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: you tried to allocate"
    ),
)


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def batcher(metrics: Metrics) -> Iterator[Batcher]:
    made = Batcher(metrics=metrics)
    yield made
    made.close()


def shortages(metrics: Metrics) -> int:
    (line,) = (x for x in metrics.render().decode().splitlines() if x.startswith("octavo_out_of_memory_total"))
    return int(float(line.split()[1]))


def quiet(_step: Step) -> None:
    """A watcher that does not care."""


def test_turns_become_smaller_until_they_fit_and_every_run_ends_as_it_does_alone(
    batcher: Batcher, metrics: Metrics
) -> None:
    """Eight runs of one row each where memory holds three: turns of eight, four, then two."""
    model = FakeModel()
    part = Loaded(model)
    runs = [a_run(part, steps=5, seed=n) for n in range(8)]
    alone = [solve(run, quiet) for run in runs]
    model.calls.clear()
    model.memory = 3
    with ThreadPoolExecutor(8) as pool:
        model.gate.clear()
        futures = [pool.submit(batcher.solve, run, quiet) for run in runs]
        while batcher.busy < 8:
            assert not any(future.done() for future in futures)
        model.gate.set()
        for future, expected in zip(futures, alone, strict=True):
            assert torch.equal(future.result(WAIT), expected)
    assert max(model.calls) <= 3
    assert sum(model.calls) == 8 * 5
    assert shortages(metrics) >= 1
    assert batcher._budget is not None
    assert batcher._budget.now < batcher._budget.most


def test_the_budget_grows_back_when_memory_is_there_again(batcher: Batcher) -> None:
    model = FakeModel()
    part = Loaded(model)
    batcher.solve(a_run(part), quiet)
    assert batcher._budget is not None
    most = batcher._budget.most
    batcher._budget.cut(most)
    batcher.solve(a_run(part, steps=PATIENCE), quiet)
    assert batcher._budget.now == most


def test_one_question_that_is_too_large_is_answered_row_by_row(batcher: Batcher, metrics: Metrics) -> None:
    """A run of three pictures with guidance is six rows; from its first shortage on it goes one row at a time."""
    model = FakeModel()
    run = a_run(Loaded(model), steps=4, pictures=3, guidance=2.0)
    expected = solve(run, quiet)
    model.calls.clear()
    model.memory = 1
    assert torch.equal(batcher.solve(run, quiet), expected)
    assert model.calls == [1] * 6 * 4
    assert shortages(metrics) == 1


def test_what_is_not_needed_leaves_memory_when_even_a_row_does_not_fit(metrics: Metrics) -> None:
    model = FakeModel()
    part = Loaded(model)
    kept: list[tuple[object, ...]] = []

    def relief(*keep: object) -> None:
        kept.append(keep)
        model.memory = None

    run = a_run(part, steps=3)
    expected = solve(run, quiet)
    model.memory = 0
    batcher = Batcher(metrics=metrics, relief=relief)
    assert torch.equal(batcher.solve(run, quiet), expected)
    batcher.close()
    assert kept == [(part,)], "all but the run's own model"


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_run_that_never_fits_fails_alone_and_says_so(
    batcher: Batcher, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Latents of 6x6 never fit; those of 4x4 beside them do, then and afterwards."""
    model = FakeModel()
    part = Loaded(model)
    plain = FakeModel.forward

    def forward(self: FakeModel, latents: Tensor, *inputs: object, **options: object) -> Tensor:
        if latents.shape[-1] == 6:
            raise error
        return plain(self, latents, *inputs, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(FakeModel, "forward", forward)
    small = a_run(part, steps=6)
    expected = solve(small, quiet)
    with ThreadPoolExecutor(2) as pool:
        other = pool.submit(batcher.solve, small, quiet)
        with pytest.raises(OutOfMemoryError, match=r"1 picture of 48x48 pixels.*smaller picture"):
            batcher.solve(a_run(part, size=(6, 6)), quiet)
        assert torch.equal(other.result(WAIT), expected)
    assert torch.equal(batcher.solve(small, quiet), expected)


def test_memory_that_is_short_while_a_run_is_let_in_ends_only_that_run(
    batcher: Batcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = FakeModel()
    run = a_run(Loaded(model))
    expected = solve(run, quiet)
    with monkeypatch.context() as patch:
        patch.setattr(model, "modulation", failing(MemoryError(), times=10))
        with pytest.raises(OutOfMemoryError):
            batcher.solve(a_run(Loaded(model)), quiet)
    assert torch.equal(batcher.solve(a_run(Loaded(model)), quiet), expected)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_other_work_is_tried_once_more_after_relief(error: Exception) -> None:
    freed: list[tuple[object, ...]] = []
    batcher = Batcher(relief=lambda *keep: freed.append(keep))
    once, thrice = failing(error, times=1), failing(error, times=3)
    assert batcher.do(lambda: once() or "done") == "done"
    assert freed == [()]
    with pytest.raises(OutOfMemoryError, match="encoding or decoding"):
        batcher.do(thrice)
    assert batcher.do(lambda: 7) == 7
    batcher.close()


def test_the_tensors_of_an_attempt_that_failed_are_gone_before_the_next(batcher: Batcher) -> None:
    """Otherwise the second attempt would have less memory than the first."""
    alive: list[int] = []
    living = 0

    class Big:
        def __init__(self) -> None:
            nonlocal living
            living += 1

        def __del__(self) -> None:
            nonlocal living
            living -= 1

    def work() -> None:
        alive.append(living)
        big = Big()
        raise MemoryError(str(big)[:0])

    with pytest.raises(OutOfMemoryError):
        batcher.do(work)
    assert alive == [0, 0]


def test_decoding_goes_over_to_tiles_where_memory_is_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A VAE that cannot hold more than the smallest tiles; what it gives is what these tiles give when asked for."""
    vae = load("tiny", models_dir=write_tiny_tree(tmp_path / "models"), device="cpu").vae()
    latents = torch.randn(1, 16, TILE // 2 + 8, TILE // 2 + 8, generator=torch.Generator().manual_seed(0))
    expected = decode(vae, latents, tile=TILE // 2, overlap=8)
    plain = vae.decode
    sides: list[int] = []

    def short(z: Tensor) -> Tensor:
        sides.append(max(z.shape[-2:]))
        if sides[-1] > TILE // 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return plain(z)

    monkeypatch.setattr(vae, "decode", short)
    assert torch.equal(decode_as_fits(vae, latents), expected)
    assert sides[0] == sides[1] == TILE // 2 + 8, "first whole, then in tiles, of which one covers this picture"
    assert "smaller tiles" in caplog.text
    monkeypatch.setattr(vae, "decode", failing(ValueError("another mistake"), times=9))
    with pytest.raises(ValueError, match="another mistake"):
        decode_as_fits(vae, latents)


def failing(error: Exception, *, times: int) -> Callable[..., None]:
    """A function that raises so many times."""
    left = times

    def fail(*_: object, **__: object) -> None:
        nonlocal left
        if left:
            left -= 1
            raise error

    return fail
