"""In-flight batching: one thread owns the device, and at every step runs may join and leave what it is doing.

    batcher = Batcher()
    latents = batcher.solve(run, watch)      # from any number of threads; a `pipeline.run.Solve`
    pixels = batcher.do(lambda: decode(…))   # other work of the device, in between

A turn: choose questions (`policy`), answer them in one go (`pipeline.denoise`), let each run take its answer. Runs need
have nothing in common but the model and the size of their latents: sampler, steps, seed and guidance are their own. The
callers wait in their own threads, where their watchers are called too, so that previews cost the device's thread
nothing, and a run that is given up is gone before the next turn. A run that fails does so alone.

Nothing runs beside the steps on a stream of its own: on a CPU there is nothing to gain, the cores are busy; on a GPU
encoding and decoding take a small share of a request, and memory is what is short.
"""

import logging
from collections import deque
from collections.abc import Callable, Sequence
from threading import Condition, Thread, current_thread
from time import perf_counter
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor

from octavo.devices import whole_processor
from octavo.engine.memory import first_that_fits
from octavo.engine.metrics import Metrics
from octavo.engine.policy import Budget, Preference, Turns, choose
from octavo.engine.seats import Failure, Seat, Work
from octavo.errors import NumericsError, ShutdownError
from octavo.models import MMDiT
from octavo.pipeline.finite import denoise_each
from octavo.pipeline.run import Run, Walk, Watch
from octavo.pipeline.sparing import Short, Smaller, attempt, collect, nothing_to_give
from octavo.pipeline.tables import Tables
from octavo.sampling import Guided

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Tokens of a turn. Where a turn of twice as many takes twice as long, more only delays those who wait.
CPU_TOKENS = 1024
QUICK = 0.06  # seconds of a CPU's turn of more: questions of the embedded model still take less time each
GPU_TOKENS = 16384  # of 1024x1024 px one picture with guidance, of 512x512 px six

LOAD_SECONDS = 0.2  # a model that takes longer to be given was read from its file


class Relief(Protocol):
    """Gives up whatever can be loaded again but the parts to keep, as `pipeline.shelf.Shelf.free` does."""

    def __call__(self, *keep: Any) -> object: ...


class Batcher:
    """Owns the device; made once, closed at the end."""

    def __init__(
        self,
        *,
        max_tokens: int | None = None,
        metrics: Metrics | None = None,
        relief: Relief | None = None,
        smaller: Smaller = nothing_to_give,
        tables: Tables | None = None,
    ) -> None:
        """Start the device's thread.

        Args:
            max_tokens: of text and image, over all rows, that a turn takes through the model; None for what suits the
                device. A single question is answered whatever it takes.
            metrics: counts turns and seconds.
            relief: called where memory is short; the run's `mmdit` is what to keep.
            smaller: called where that did not suffice; goes over to a smaller memory plan, if there is one.
            tables: of modulation, where they are shared with others.
        """
        self._budget = None if max_tokens is None else Budget(max_tokens)
        self._metrics, self._relief, self._smaller = metrics, relief, smaller
        self._tables = Tables() if tables is None else tables
        self._turns, self._preference = Turns(), Preference()
        self._changed = Condition()
        self._arrivals: deque[Seat] = deque()
        self._works: deque[Work[Any]] = deque()
        self._seats: list[Seat] = []  # that whose question waits longest first; the device thread's own
        self._closed = False
        self._thread = Thread(target=self._serve, name="octavo-device", daemon=True)
        self._thread.start()

    # For callers, in their own threads

    def solve(self, run: Run, watch: Watch) -> Tensor:
        """Walk a run in company; a `pipeline.run.Solve`.

        Args:
            run: shares turns with others whose `mmdit` is equal.
            watch: called here, in this thread, at the start and after each evaluation; what it raises withdraws the
                run before the next turn and is raised here.

        Returns:
            What the sampler ends in, [B, 16, h, w] like `run.x`.

        Raises:
            NumericsError: the model or the sampler gave NaN or infinity in this run.
            OutOfMemoryError: memory does not suffice for this run alone.
            ShutdownError: the batcher was closed.
            OctavoError: as `pipeline.run.solve`.
        """
        assert current_thread() is not self._thread, "work on the device cannot wait for a run"
        seat, start = Seat(run), perf_counter()
        self._enter(self._arrivals, seat)
        try:
            while True:
                news = seat.news.get()
                if isinstance(news, BaseException):
                    raise news
                if isinstance(news, Tensor):
                    return news
                watch(news)
        finally:
            seat.withdrawn = True
            if self._metrics:
                self._metrics.seconds("denoise", perf_counter() - start)

    def do(self, work: Callable[[], T]) -> T:
        """Do other work on the device, between two turns, and wait for it.

        Args:
            work: called in the device's thread, inside torch.inference_mode; a second time if memory was short.

        Raises:
            OutOfMemoryError: memory does not suffice for this work.
            ShutdownError: the batcher was closed.
            Whatever `work` raises.
        """
        if current_thread() is self._thread:  # work that is part of other work
            return work()
        piece = Work(work)
        self._enter(self._works, piece)
        result = piece.outcome.get()
        if isinstance(result, Failure):
            raise result.error
        return result

    def close(self) -> None:
        """Stop after the turn or the work that is being done; whoever waits gets a ShutdownError."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if current_thread() is not self._thread:
            self._thread.join()

    @property
    def busy(self) -> int:
        """Runs under way."""
        return len(self._seats) + len(self._arrivals)

    def _enter(self, line: deque[Any], item: Any) -> None:
        with self._changed:
            if self._closed:
                raise _stopped()
            line.append(item)
            self._changed.notify()

    # The device's thread

    def _serve(self) -> None:
        fault: BaseException | None = None
        try:
            with torch.inference_mode(), whole_processor():
                while self._something_to_do():
                    self._serve_once()
        except BaseException as error:
            logger.exception("The device's thread ends by a fault of its own.")
            fault = error
        with self._changed:
            self._closed = True
        # Nobody enters any more.
        for seat in (*self._seats, *self._arrivals):
            seat.fail(_stopped(fault))
        for piece in self._works:
            piece.outcome.put(Failure(_stopped(fault)))
        self._seats, self._arrivals, self._works = [], deque(), deque()

    def _serve_once(self) -> None:
        for _ in range(len(self._arrivals)):  # whoever comes meanwhile is let in after a turn
            self._admit(self._arrivals.popleft())
        if self._works and (self._turns.work_is_next or not self._seats):
            self._work(self._works.popleft())
        elif self._seats:
            self._turn()

    def _something_to_do(self) -> bool:
        """Wait for something; False at the end."""
        with self._changed:
            self._seats = [seat for seat in self._seats if not seat.withdrawn]
            while not (self._closed or self._works or self._arrivals or self._seats):
                self._changed.wait()
            return not self._closed

    def _admit(self, seat: Seat) -> None:
        """Let a run begin: its tables and its first question."""
        if self._budget is None:
            on_cpu = seat.run.x.device.type == "cpu"
            self._budget = Budget(CPU_TOKENS, quick=QUICK) if on_cpu else Budget(GPU_TOKENS)
        try:
            self._model(seat)
            seat.begin(self._sparing([lambda: Walk(seat.run, cache=self._tables)], seat.what, seat))
        except Exception as error:
            seat.fail(error)
        else:
            self._return(seat)

    def _return(self, seat: Seat) -> None:
        """Tell how far a run is; it stands at the end of the line, unless it is done."""
        if seat.report():
            self._seats.append(seat)

    def _work(self, piece: Work[Any]) -> None:
        start = perf_counter()
        try:
            result: Any = self._sparing([piece.work], "encoding or decoding")
        except BaseException as error:  # whatever it is, it is the caller's
            result = Failure(error)
        piece.outcome.put(result)
        self._turns.work_took(perf_counter() - start)

    def _turn(self) -> None:
        """Answer the questions of some runs, and let these go on."""
        assert self._budget is not None
        start = perf_counter()
        chosen = choose(self._preference.sort(self._seats, start), self._budget.tokens)
        answers = self._answers(chosen)
        if isinstance(answers, Short):
            self._budget.cut(sum(seat.tokens for seat in chosen))
            logger.warning("Memory does not suffice for a turn of %d runs (%s).", len(chosen), answers.said)
            return
        self._budget.went_well()
        self._seats = [seat for seat in self._seats if seat not in chosen]
        tokens, forecast = sum(seat.tokens for seat in chosen), 0
        for seat, answer in zip(chosen, answers, strict=True):
            if isinstance(answer, Exception):
                seat.fail(answer)
                continue
            forecast -= seat.walk.step.forecast
            try:
                seat.walk.answer(answer)
            except Exception as error:
                seat.fail(error)
            else:
                self._return(seat)
            forecast += seat.walk.step.forecast
        seconds = perf_counter() - start
        self._turns.turn_took(seconds)
        self._budget.took(tokens, seconds)
        if self._metrics:
            self._metrics.turn(len(chosen), tokens, seconds)
            self._metrics.forecast(forecast)

    def _answers(self, chosen: list[Seat]) -> list[Guided | Exception] | Short:
        """The model's answers, or each run's own failure; `Short` where fewer questions might do."""
        if len(chosen) == 1:
            return [self._alone(chosen[0])]
        try:
            done = attempt(lambda: self._ask(chosen))
        except Exception:
            # The one whose fault it is fails again when it is alone.
            return [self._alone(seat) for seat in chosen]
        if isinstance(done, Short):
            self._count_short()
        return done

    def _alone(self, seat: Seat) -> Guided | Exception:
        """One run's answer, with whatever memory there is."""

        def whole() -> Guided | Exception:
            return self._ask([seat], most_rows=1 if seat.row_by_row else None)[0]

        def row_by_row() -> Guided | Exception:
            seat.row_by_row = True
            return whole()

        try:
            return self._sparing([whole, row_by_row], seat.what, seat)
        except Exception as error:
            return error

    def _ask(self, chosen: list[Seat], most_rows: int | None = None) -> list[Guided | Exception]:
        answers: list[Guided | NumericsError] = denoise_each(
            self._model(chosen[0]),
            [seat.question for seat in chosen],
            evaluations=[seat.walk.step.done + 1 for seat in chosen],
            retry_bf16=[seat.run.retry_bf16 for seat in chosen],
            cache=self._tables,
            most_rows=most_rows,
        )
        return cast("list[Guided | Exception]", answers)

    def _model(self, seat: Seat) -> MMDiT:
        start = perf_counter()
        mmdit = seat.run.mmdit()
        now = perf_counter()
        if now - start > LOAD_SECONDS:
            self._preference.loaded(seat.model, now - start, now)
        return mmdit

    def _sparing(self, ways: Sequence[Callable[[], T]], what: str, seat: Seat | None = None) -> T:
        """What the first way gives for which memory suffices; the last one is tried again in all that there is."""

        def relieved() -> T:
            self._tables.clear()
            if self._relief is not None:
                self._relief(*([] if seat is None else [seat.run.mmdit]))
            collect()
            return ways[-1]()

        def counted(way: Callable[[], T]) -> Callable[[], T]:
            def run() -> T:
                self._count_short()
                return way()

            return run

        return first_that_fits([ways[0], *map(counted, [*ways[1:], relieved])], what, self._smaller)

    def _count_short(self) -> None:
        if self._metrics:
            self._metrics.out_of_memory()


def _stopped(fault: BaseException | None = None) -> ShutdownError:
    why = "The server is stopping" if fault is None else f"The device's thread ended by a fault of its own ({fault!r})"
    return ShutdownError(f"{why}, so that this was not finished; it is run again after the next start.")
