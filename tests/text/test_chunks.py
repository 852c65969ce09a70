"""How tokens are cut into chunks."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.text.chunks import LONG_GROUP, Token, Vector, complete, cut_into_chunks

START, END, PAD = 90, 91, 0


def lengths(groups: list[int], room: int | None) -> list[int]:
    return [len(chunk) for chunk in cut_into_chunks([[Token(1)] * count for count in groups], room)]


def test_a_short_group_moves_whole_to_the_next_chunk() -> None:
    assert lengths([70, LONG_GROUP - 1], room=75) == [70, LONG_GROUP - 1]


def test_a_long_group_is_split_where_the_chunk_is_full() -> None:
    assert lengths([70, LONG_GROUP], room=75) == [75, 3]


def test_a_group_that_fits_exactly_opens_no_further_chunk() -> None:
    assert lengths([75], room=75) == [75]


def test_a_short_group_that_fits_no_chunk_is_split_all_the_same() -> None:
    assert lengths([1, 5], room=2) == [2, 2, 2]


def test_without_a_limit_all_is_one_chunk() -> None:
    assert lengths([70, 10, 300], room=None) == [380]
    assert lengths([], room=None) == [0]


@settings(deadline=None)
@given(st.lists(st.integers(0, 30)), st.integers(1, 40))
def test_no_token_is_lost_and_no_chunk_too_long(counts: list[int], room: int) -> None:
    numbers = iter(range(sum(counts)))
    groups = [[Token(next(numbers)) for _ in range(count)] for count in counts]
    chunks = cut_into_chunks(groups, room)
    assert [token for chunk in chunks for token in chunk] == [token for group in groups for token in group]
    assert all(len(chunk) <= room for chunk in chunks)
    assert all(chunks[1:])


@settings(deadline=None)
@given(st.lists(st.integers(0, 30)), st.integers(LONG_GROUP, 40))
def test_short_groups_stay_in_one_chunk(counts: list[int], room: int) -> None:
    groups = [[Token(group)] * count for group, count in enumerate(counts)]
    chunks = cut_into_chunks(groups, room)
    for group in groups:
        if 0 < len(group) < LONG_GROUP:
            assert sum(group[0] in chunk for chunk in chunks) == 1


def test_special_tokens_and_padding_have_weight_one() -> None:
    chunk = complete([Token(5, 1.3)], before=[START], end=END, pad=PAD, length=6)
    assert chunk.ids == (START, 5, END, PAD, PAD, PAD)
    assert chunk.weights == (1.0, 1.3, 1.0, 1.0, 1.0, 1.0)
    assert chunk.end == 2
    assert chunk.weighted


def test_a_text_longer_than_the_minimum_is_left_whole() -> None:
    chunk = complete([Token(5)] * 9, before=[], end=END, pad=PAD, length=6)
    assert chunk.ids == (5,) * 9 + (END,)
    assert not chunk.weighted


def test_vectors_are_known_by_their_positions() -> None:
    vector = Vector("name", "clip_l", 1)
    chunk = complete([Token(5), Token(0, 1.2, vector)], before=[START], end=END, pad=PAD, length=5)
    assert chunk.vectors == {2: vector}
    assert chunk.weights[2] == pytest.approx(1.2)


def test_the_end_is_the_first_end_token_even_if_the_prompt_wrote_it() -> None:
    assert complete([Token(5), Token(END), Token(6)], before=[START], end=END, pad=END, length=8).end == 2


def test_a_vector_is_never_taken_for_the_end() -> None:
    vector = Vector("name", "clip_l", 0)
    assert complete([Token(0, 1.0, vector)], before=[START], end=0, pad=0, length=5).end == 2
