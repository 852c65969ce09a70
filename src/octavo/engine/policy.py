"""Who is served next: which questions share a turn of the running batch, and how turns and other work alternate.

The question that waits longest is always served, with as many others beside it as share a call with it and fit the
budget, in the order they wait. So a question waits for at most as many turns as there were questions ahead of it when
it was asked: whatever comes later stands behind it, and each turn serves at least the first. No run starves, a long one
cannot keep a short one out, and a run of few steps passes through as quickly as its steps allow.

No torch here: the policy knows of a question only which model it is for, what it can share and what it costs.
"""

from collections.abc import Collection, Hashable, Sequence
from typing import Protocol, TypeVar

PATIENCE = 64  # turns that must go well before a budget that was cut grows again
MOST_PATIENCE = 4096
LARGEST = 4  # times the budget, that a turn takes which is quick all the same
STAY = 4.0  # a model that took a second to load is kept for so many, where others wait


class Ask(Protocol):
    """A question that waits for its answer."""

    @property
    def model(self) -> Hashable:
        """Which model it is for; only questions of one model share a turn."""

    @property
    def shapes(self) -> Collection[Hashable]:
        """The shapes of its rows; rows of one shape share a call of the model."""

    @property
    def tokens(self) -> int:
        """What it costs, over all its rows."""


A = TypeVar("A", bound=Ask)


def choose(waiting: Sequence[A], budget: int) -> list[A]:
    """The questions of the next turn.

    Args:
        waiting: those that wait, the longest first; at least one.
        budget: tokens that a turn may cost; the first question is served whatever it costs.

    Returns:
        The first, and those that share a call of the model with it, as far as the budget goes. One that does not fit is
        passed over for a smaller one behind it, and so comes nearer to being the first itself.
    """
    first = waiting[0]
    chosen, spent, shapes = [first], first.tokens, set(first.shapes)
    for ask in waiting[1:]:
        if ask.model == first.model and spent + ask.tokens <= budget and not shapes.isdisjoint(ask.shapes):
            chosen.append(ask)
            spent += ask.tokens
    return chosen


class Turns:
    """How turns of the batch and other work share the device where both wait.

    After every turn at least one piece of work is done, and more until they have taken as long as the turn took. So a
    piece of work waits for at most as many turns as there is work ahead of it, and a turn for at most one piece of work
    that is longer than a turn; many short ones, such as the texts of requests that come together, are not held up one
    by one.
    """

    def __init__(self) -> None:
        self._allowance = 0.0
        self._due = True

    def turn_took(self, seconds: float) -> None:
        """A turn is over."""
        self._allowance, self._due = seconds, True

    def work_took(self, seconds: float) -> None:
        """A piece of work is over."""
        self._allowance -= seconds
        self._due = False

    @property
    def work_is_next(self) -> bool:
        """Whether work goes before the next turn, where both wait."""
        return self._due or self._allowance > 0


class Budget:
    """How many tokens a turn may take through the model: less for a while after memory was short.

    Where the model is small, a turn that takes many more is still over in no time, and costs each question less.

    Attributes:
        most: without any shortage, whatever the model.
        now: at the moment, likewise.
    """

    def __init__(self, most: int, *, quick: float = 0.0) -> None:
        """Begin without a shortage.

        Args:
            most: tokens.
            quick: seconds that a turn of more than these may take; 0 for never more.
        """
        self.most = self.now = most
        self._quick, self._in_time, self._roof = quick, 0, LARGEST * most
        self._patience, self._good = PATIENCE, 0

    @property
    def tokens(self) -> int:
        """What the next turn may take."""
        return self.now if self.now < self.most else max(self.most, min(self._in_time, self._roof))

    def cut(self, tokens: int) -> None:
        """Memory was too short for a turn of so many tokens: half of them, for twice as many turns as last time."""
        if self.now < self.most:
            self._patience = min(2 * self._patience, MOST_PATIENCE)
        self._roof = min(self._roof, tokens // 2)
        self.now, self._good = max(1, min(self.now, tokens) // 2), 0

    def took(self, tokens: int, seconds: float) -> None:
        """A turn of so many tokens was over in this time; the next may take twice as many at most."""
        self._in_time = min(2 * tokens, int(self._quick * tokens / seconds)) if seconds > 0 else 0

    def went_well(self) -> None:
        """A turn was done; after enough of them the budget doubles, up to what it was."""
        if self.now == self.most:
            return
        self._good += 1
        if self._good >= self._patience:
            self.now, self._good = min(2 * self.now, self.most), 0


class Preference:
    """Which model's questions go first, where a change of models means to read one from its file.

    Two models that do not fit in memory side by side would otherwise be loaded anew for every turn. A model that has
    just been read is kept to for `STAY` times as long as that took; after that the question that waits longest decides
    again. So the wait is longer than the policy's bound by no more than that time for each change.
    """

    def __init__(self) -> None:
        self._model: Hashable = None
        self._until = 0.0

    def loaded(self, model: Hashable, seconds: float, now: float) -> None:
        """`model` was read from its file in so many seconds."""
        self._model, self._until = model, now + STAY * seconds

    def sort(self, waiting: Sequence[A], now: float) -> list[A]:
        """Those that wait, the preferred model's first, otherwise in their order."""
        if now >= self._until:
            return list(waiting)
        return sorted(waiting, key=lambda ask: ask.model != self._model)
