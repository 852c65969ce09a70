"""Laws of who is served next: nobody waits longer than the line that was ahead, and turns and other work alternate."""

from collections import deque
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from octavo.engine.policy import LARGEST, PATIENCE, STAY, Budget, Preference, Turns, choose


@dataclass(eq=False)
class Asked:
    """A question of some run."""

    model: str
    shapes: frozenset[int]
    tokens: int


QUESTIONS = st.builds(
    Asked,
    model=st.sampled_from("ab"),
    shapes=st.frozensets(st.integers(0, 3), min_size=1, max_size=2),
    tokens=st.integers(1, 100),
)


@given(st.lists(QUESTIONS, min_size=1, max_size=20), st.integers(1, 200))
def test_a_turn_serves_the_first_and_whoever_shares_a_call_with_it_within_the_budget(
    waiting: list[Asked], budget: int
) -> None:
    chosen = choose(waiting, budget)
    first = waiting[0]
    assert chosen[0] is first
    assert [ask for ask in waiting if ask in chosen] == chosen, "in the order they wait"
    assert all(ask.model == first.model and ask.shapes & first.shapes for ask in chosen)
    spent = sum(ask.tokens for ask in chosen)
    assert spent <= budget or chosen == [first]
    # Nothing that fits is left behind, or the device would idle.
    left = [ask for ask in waiting if ask not in chosen and ask.model == first.model and ask.shapes & first.shapes]
    for ask in left:
        ahead = sum(other.tokens for other in chosen if waiting.index(other) < waiting.index(ask))
        assert ahead + ask.tokens > budget


@given(
    st.lists(st.tuples(QUESTIONS, st.integers(1, 6), st.integers(0, 8)), min_size=1, max_size=12), st.integers(1, 300)
)
def test_no_question_waits_for_more_turns_than_questions_were_ahead_of_it(
    runs: list[tuple[Asked, int, int]], budget: int
) -> None:
    """Runs of so many questions join at some turn; each question stands behind those that wait."""
    line: list[
        tuple[Asked, int, int, int]
    ] = []  # question, those left of its run, when it was asked, how many were ahead
    turn = 0
    coming = deque(sorted(runs, key=lambda run: run[2]))
    while line or coming:
        while coming and coming[0][2] <= turn:
            ask, questions, _ = coming.popleft()
            line.append((ask, questions, turn, len(line)))
        if line:
            chosen = choose([ask for ask, *_ in line], budget)
            served = [entry for entry in line if entry[0] in chosen]
            line = [entry for entry in line if entry[0] not in chosen]
            for ask, questions, asked, ahead in served:
                assert turn - asked <= ahead
                if questions > 1:
                    line.append((Asked(ask.model, ask.shapes, ask.tokens), questions - 1, turn + 1, len(line)))
        turn += 1


@given(st.lists(st.tuples(st.floats(0.01, 10), st.floats(0.01, 10)), min_size=1, max_size=50))
def test_turns_and_other_work_take_turns_where_both_always_wait(seconds: list[tuple[float, float]]) -> None:
    """After each turn at least one piece of work; all but its last are together shorter than the turn was."""
    turns = Turns()
    assert turns.work_is_next, "work goes first, for it is what lets runs join"
    for of_turn, of_work in seconds:
        turns.turn_took(of_turn)
        done = 0
        while turns.work_is_next:
            turns.work_took(of_work)
            done += 1
        assert done >= 1
        assert (done - 1) * of_work < of_turn + 1e-9
        assert done * of_work >= of_turn - 1e-9 or done == 1


def test_a_budget_is_halved_at_once_and_grows_back_after_patience() -> None:
    budget = Budget(1000)
    budget.cut(800)
    assert budget.now == 400
    budget.cut(300)
    assert budget.now == 150
    waited, last = [], budget.now
    for turn in range(20 * PATIENCE):
        budget.went_well()
        if budget.now != last:
            waited.append((turn, budget.now))
            last = budget.now
    assert [now for _, now in waited] == [300, 600, 1000]
    assert waited[0][0] == 2 * PATIENCE - 1, "the second shortage in a row doubles the patience"
    assert budget.now == budget.most


def test_turns_that_are_quick_may_be_larger_up_to_a_bound() -> None:
    budget, speed = Budget(1000, quick=0.06), 50_000  # tokens a second: 3000 in 60 ms
    taken = []
    for _ in range(5):
        taken.append(budget.tokens)
        budget.took(taken[-1], taken[-1] / speed)
    assert taken == [1000, 2000, 3000, 3000, 3000], "at most twice as many at once"
    budget.took(3000, 3000 / 10_000)  # a larger model: 600 in 60 ms
    assert budget.tokens == 1000
    budget.took(4000, 1e-6)
    assert budget.tokens == LARGEST * 1000
    budget.cut(3000)
    assert budget.tokens == 500, "memory counts first"
    for _ in range(2 * PATIENCE):
        budget.went_well()
    budget.took(3000, 1e-6)
    assert budget.tokens == 1500, "what was too much is not tried again"


def test_a_budget_that_was_named_is_kept() -> None:
    budget = Budget(1000)
    budget.took(1000, 1e-6)
    assert budget.tokens == 1000


def test_a_single_token_is_always_allowed() -> None:
    budget = Budget(8)
    for _ in range(10):
        budget.cut(budget.now)
    assert budget.now == 1


def test_a_model_that_was_read_is_kept_to_for_a_while_and_no_longer() -> None:
    preference = Preference()
    a, b = Asked("a", frozenset({0}), 1), Asked("b", frozenset({0}), 1)
    assert preference.sort([a, b], now=0.0) == [a, b]
    preference.loaded("b", seconds=2.0, now=10.0)
    assert preference.sort([a, b, a], now=10.1) == [b, a, a]
    assert preference.sort([a, b], now=10.0 + 2.0 * STAY) == [a, b]
