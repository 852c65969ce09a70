"""Who waits for the device: runs that have a seat in the batch, and other work. Each tells its caller how it goes."""

from collections.abc import Callable, Collection, Hashable
from queue import SimpleQueue
from typing import Generic, TypeVar

from torch import Tensor

from octavo.errors import NumericsError
from octavo.pipeline.denoise import Question
from octavo.pipeline.run import Run, Step, Walk

T = TypeVar("T")


class Seat:
    """A run in the batch. `news` goes to its caller: steps, then the latents or what went wrong."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.news: SimpleQueue[Step | Tensor | BaseException] = SimpleQueue()
        self.withdrawn = False  # set by its caller, at any time
        self.row_by_row = False  # memory did not suffice for all of its rows at once
        self._walk: Walk | None = None
        self.shapes: Collection[Hashable] = ()
        self.tokens = 0

    @property
    def model(self) -> Hashable:
        """As `policy.Ask` wants it."""
        return self.run.mmdit

    @property
    def walk(self) -> Walk:
        """The run under way, once it has begun."""
        assert self._walk is not None
        return self._walk

    @property
    def question(self) -> Question:
        """What it waits for."""
        assert self.walk.question is not None
        return self.walk.question

    @property
    def what(self) -> str:
        """In words."""
        rows, _, height, width = self.run.x.shape
        return f"{rows} picture{'s' if rows > 1 else ''} of {8 * width}x{8 * height} pixels"

    def begin(self, walk: Walk) -> None:
        """Its tables are made."""
        self._walk = walk

    def report(self) -> bool:
        """Tell the caller of the step, and of the result; whether there is another question."""
        self.news.put(self.walk.step)
        if self.walk.question is not None:
            self.shapes, self.tokens = self.walk.question.shapes, self.walk.question.tokens
            return True
        try:
            self.news.put(self.walk.result)
        except NumericsError as error:
            self.fail(error)
        return False

    def fail(self, error: BaseException) -> None:
        """Tell the caller what went wrong, which ends the run."""
        self.news.put(error)


class Work(Generic[T]):
    """Other work for the device."""

    def __init__(self, work: Callable[[], T]) -> None:
        self.work = work
        self.outcome: SimpleQueue[T | Failure] = SimpleQueue()


class Failure:
    """In place of a result, which may itself be an exception."""

    def __init__(self, error: BaseException) -> None:
        self.error = error
