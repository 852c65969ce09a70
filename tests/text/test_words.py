"""A vocabulary of whole words: what becomes a token, what becomes a letter, what is unknown."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from octavo.errors import RequestError
from octavo.text.words import word_level_tokenizer

WORDS = ("a", "red", "circle", "left", "of", "the", "word", ",", "2")


@pytest.fixture(scope="module")
def lettered() -> Tokenizer:
    return word_level_tokenizer(WORDS, letters=True)


def content(tokenizer: Tokenizer, text: str) -> list[str]:
    return tokenizer.encode(text, add_special_tokens=False).tokens


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("A Red, circle\tleft-of.", ["a", "red", ",", "circle", "left", "of"]),
        ("the word HELLO", ["the", "word", *"HELLO"]),
        ("HI A RED I", [*"HI", "a", *"RED", "<unknown>"]),
        ("rED iPHOne", ["red", "<unknown>"]),
        ("red2", ["red", "2"]),
        ("<pad> HELLO!", ["<unknown>", *"HELLO"]),
        ("red 😀", ["red", "<unknown>"]),
        ("", []),
        (" \t\n\x00", []),
    ],
)
def test_capitals_become_letters_and_the_rest_words(lettered: Tokenizer, text: str, tokens: list[str]) -> None:
    assert content(lettered, text) == tokens


def test_without_letters_all_text_is_lower_cased() -> None:
    assert content(word_level_tokenizer(WORDS), "A RED Circle") == ["a", "red", "circle"]


def test_special_tokens_stand_around_every_text_and_pad_is_zero() -> None:
    clip, t5 = word_level_tokenizer(WORDS), word_level_tokenizer(WORDS, start=None)
    assert clip.encode("red").tokens == ["<start>", "red", "<end>"]
    assert t5.encode("red").tokens == ["red", "<end>"]
    assert clip.token_to_id("<pad>") == t5.token_to_id("<pad>") == 0


@pytest.mark.parametrize("word", ["Red", "left-of", "two words", "", "x1", ".."])
def test_a_word_that_no_text_could_reach_is_refused(word: str) -> None:
    with pytest.raises(RequestError, match="would be read as"):
        word_level_tokenizer([word])


@settings(deadline=None)
@given(st.text(alphabet="abAB ,.2", max_size=60))
def test_the_saved_file_reads_as_the_tokenizer_that_wrote_it(text: str) -> None:
    tokenizer = word_level_tokenizer(["a", "ab", "b", ",", "2"], letters=True)
    assert Tokenizer.from_str(tokenizer.to_str()).encode(text).ids == tokenizer.encode(text).ids


@settings(deadline=None)
@given(st.text(alphabet=st.sampled_from("abcABC"), min_size=1, max_size=12))
def test_letters_are_exactly_the_words_of_two_or_more_capitals(word: str) -> None:
    tokens = content(word_level_tokenizer([], letters=True), word)
    if word.isupper() and len(word) > 1:
        assert tokens == list(word)
    else:
        assert tokens == ["<unknown>"]


def test_a_saved_file_can_be_read_from_its_path(tmp_path: Path, lettered: Tokenizer) -> None:
    path = tmp_path / "clip_l.tokenizer.json"
    lettered.save(str(path))
    assert Tokenizer.from_file(str(path)).encode("a RED circle").ids == lettered.encode("a RED circle").ids
