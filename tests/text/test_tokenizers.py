"""Prompts to chunks, for one encoder and for all three."""

import subprocess
import sys
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.errors import CheckpointError
from octavo.text.prompt import escape, parse_weights
from octavo.text.tokenizers import EncoderTokenizer, Tokenizers
from octavo.text.vocabulary import Vocabulary, clip_vocabulary, t5_vocabulary
from octavo.text.words import word_level_tokenizer

anything = st.text(
    alphabet=st.one_of(st.characters(exclude_categories=()), st.sampled_from("()[]\\:.0129- abc")), max_size=200
)
EMBEDDINGS = {
    "style": {"clip_l": (2, 768), "clip_g": (2, 1280), "t5xxl": (2, 4096)},
    "lonly": {"emb_params": (3, 768)},
    "gonly": {"clip_g": (1, 1280)},
    "empty": {},
    "long": {"clip_l": (100, 768)},
}


@pytest.fixture(scope="module")
def released() -> Tokenizers:
    return Tokenizers.released()


def small_vocabulary(start: str | None = "<start>") -> Vocabulary:
    tokenizer = word_level_tokenizer(["a", "red", "circle", "the", "word"], start=start, letters=True)
    ids = {name: tokenizer.token_to_id(name) for name in ("<start>", "<end>", "<unknown>")}
    return Vocabulary(tokenizer, () if start is None else (ids["<start>"],), ids["<end>"], ids["<unknown>"])


@pytest.fixture(scope="module")
def small() -> Tokenizers:
    """As the embedded model has it: words, short chunks, narrow vectors."""
    clip = small_vocabulary()
    return Tokenizers(
        clip_l=EncoderTokenizer.clip_l(clip, positions=16, width=64),
        clip_g=EncoderTokenizer.clip_g(clip, positions=16, width=64),
        t5=EncoderTokenizer.t5(small_vocabulary(start=None), minimum=16, width=128),
    )


@settings(deadline=None)
@given(anything)
def test_every_prompt_becomes_chunks_of_the_encoders_lengths(prompt: str) -> None:
    tokens = Tokenizers.released().encode(prompt)
    assert tokens.clip_l is not None
    assert tokens.clip_g is not None
    assert tokens.t5 is not None
    assert len(tokens.clip_l) == len(tokens.clip_g) >= 1
    for chunk in tokens.clip_l + tokens.clip_g:
        assert len(chunk.ids) == len(chunk.weights) == 77
        assert chunk.ids[0] == 49406
        assert chunk.ids[chunk.end] == 49407
    (chunk,) = tokens.t5
    assert len(chunk.ids) == len(chunk.weights) >= 77
    assert chunk.ids[chunk.end] == 1


@settings(deadline=None)
@given(st.text(alphabet=st.sampled_from("ab cat ,()[]12:é猫"), max_size=400), st.integers(3, 30))
def test_chunking_loses_no_token(prompt: str, positions: int) -> None:
    """Oracle: the ids of the segments, one after the other."""
    whole = [index for segment in parse_weights(prompt) for index in clip_vocabulary().ids(segment.text)]
    chunks = EncoderTokenizer.clip_l(positions=positions).encode(prompt).chunks
    assert [index for chunk in chunks for index in chunk.ids[1 : chunk.end]] == whole


@settings(deadline=None)
@given(st.text(alphabet="ab (cat),\\:1.2", max_size=80))
def test_an_escaped_text_has_the_ids_of_the_text_and_no_weight(text: str) -> None:
    (chunk,) = EncoderTokenizer.t5(minimum=1).encode(escape(text)).chunks
    assert list(chunk.ids) == [*t5_vocabulary().ids(text), 1]
    assert not chunk.weighted


@pytest.mark.parametrize(
    "prompt",
    [
        "\x00\x01\x1b[31m\x7f",
        "\ud800 lone \udfff",
        "a " * 5_000,
        "x" * 10_000,
        "(" * 5_000 + "a" + ":1.1)" * 5_000,
        "👨‍👩‍👧‍👦" * 300,
        "猫" * 3_000,
        "שלום \u202eمرحبا",
        "é" * 500 + "\u0301" * 5_000,
        " embedding:x" * 1_000,
        "<|startoftext|></s><pad><|endoftext|>",
    ],
    ids=[
        "controls",
        "surrogates",
        "many words",
        "one word",
        "nested",
        "emoji",
        "cjk",
        "right to left",
        "accents",
        "references",
        "special tokens",
    ],
)
def test_odd_prompts_are_tokenized_like_any_other(released: Tokenizers, small: Tokenizers, prompt: str) -> None:
    for tokenizers in (released, small):
        tokens = tokenizers.encode(prompt)
        assert tokens.clip_l
        assert tokens.clip_g
        assert tokens.t5
        tokenizers.unknown_words(prompt)


def test_clip_l_pads_with_its_end_and_the_others_with_zero(released: Tokenizers, small: Tokenizers) -> None:
    for tokenizers, end in ((released, 49407), (small, small_vocabulary().end)):
        tokens = tokenizers.encode("a")
        assert tokens.clip_l
        assert tokens.clip_g
        assert tokens.t5
        assert (tokens.clip_l[0].ids[-1], tokens.clip_g[0].ids[-1], tokens.t5[0].ids[-1]) == (end, 0, 0)


def test_a_small_model_s_vocabulary_and_lengths_are_its_own(small: Tokenizers) -> None:
    tokens = small.encode("The word (HI:1.5)")
    words = small_vocabulary().tokenizer
    assert tokens.clip_g
    assert tokens.t5
    assert [words.id_to_token(index) for index in tokens.clip_g[0].ids[:6]] == [
        "<start>", "the", "word", "H", "I", "<end>",
    ]  # fmt: skip
    assert tokens.clip_g[0].weights[:6] == (1.0, 1.0, 1.0, 1.5, 1.5, 1.0)
    assert len(tokens.clip_g[0].ids) == len(tokens.t5[0].ids) == 16


def test_words_that_a_small_model_does_not_know_are_named_as_typed(small: Tokenizers) -> None:
    assert small.unknown_words("a Purple (cat:1.2), a red cat\\) 😀 HELLO") == ["Purple", "cat", "😀"]
    assert small.unknown_words("a red circle embedding:style") == []


def test_a_word_is_known_if_any_encoder_knows_it(released: Tokenizers) -> None:
    assert released.unknown_words("a 猫") == []
    assert Tokenizers(t5=released.t5).unknown_words("a 猫") == ["猫"]
    assert Tokenizers().unknown_words("a 猫") == []


def test_missing_encoders_have_no_tokens(released: Tokenizers) -> None:
    tokens = Tokenizers(clip_g=released.clip_g).encode("a cat")
    assert tokens.clip_l is None
    assert tokens.t5 is None
    assert tokens.clip_g
    assert Tokenizers().encode("a cat").clip_g is None


def test_each_encoder_can_have_its_own_prompt(released: Tokenizers) -> None:
    tokens = released.encode("a", prompt_clip_g="b", prompt_t5="")
    assert tokens.clip_l == released.encode("a").clip_l
    assert tokens.clip_g == released.encode("b").clip_g
    assert tokens.t5 == released.encode("").t5


def test_empty_chunks_fill_up_the_clip_encoder_that_has_fewer(released: Tokenizers) -> None:
    tokens = released.encode("a " * 100, prompt_clip_g="b")
    assert tokens.clip_l
    assert tokens.clip_g
    assert len(tokens.clip_l) == len(tokens.clip_g) == 2
    assert released.clip_g
    assert tokens.clip_g[1:] == released.clip_g.encode("").chunks


def test_weighted_says_whether_an_empty_prompt_is_needed(released: Tokenizers) -> None:
    assert not released.encode("a [cat]").weighted
    assert not released.encode("(a cat:1)").weighted
    assert released.encode("a (cat)").weighted
    assert released.encode("a cat", prompt_t5="(cat:0)").weighted


def test_an_embedding_takes_a_position_for_each_of_its_vectors(released: Tokenizers) -> None:
    tokens = released.encode("a (embedding:style:1.2) cat", embeddings=EMBEDDINGS.get)
    assert tokens.warnings == ()
    for chunks, key in ((tokens.clip_l, "clip_l"), (tokens.clip_g, "clip_g")):
        assert chunks
        (chunk,) = chunks
        assert {at: (vector.key, vector.row) for at, vector in chunk.vectors.items()} == {2: (key, 0), 3: (key, 1)}
        assert chunk.weights[:5] == (1.0, 1.0, 1.2, 1.2, 1.0)
        assert chunk.end == 5


def test_an_embedding_longer_than_a_chunk_goes_on_in_the_next(released: Tokenizers) -> None:
    tokens = released.encode("embedding:long", embeddings=EMBEDDINGS.get)
    assert tokens.clip_l
    assert tokens.clip_g
    assert [len(chunk.vectors) for chunk in tokens.clip_l] == [75, 25]
    assert len(tokens.clip_g) == 2


@pytest.mark.parametrize(
    ("prompt", "warned"),
    [
        ("embedding:absent, a cat, embedding:absent", [("absent", None)]),
        ("embedding:lonly", [("lonly", "clip_g"), ("lonly", "t5xxl")]),
        ("embedding:gonly", [("gonly", "clip_l"), ("gonly", "t5xxl")]),
        ("embedding:empty", [("empty", "clip_l"), ("empty", "clip_g"), ("empty", "t5xxl")]),
    ],
)
def test_what_is_left_out_is_warned_of_once(
    released: Tokenizers, prompt: str, warned: list[tuple[str, str | None]]
) -> None:
    tokens = released.encode(prompt, embeddings=EMBEDDINGS.get)
    assert [(warning.embedding, warning.encoder) for warning in tokens.warnings] == warned
    assert all(warning.embedding in warning.text for warning in tokens.warnings)


def test_vectors_for_another_encoder_are_not_taken_for_their_width() -> None:
    """Two encoders may be equally wide, as in the embedded model; their vectors still mean different things."""
    tokenizer = EncoderTokenizer.clip_l(width=1280)
    encoded = tokenizer.encode("embedding:gonly", EMBEDDINGS.get)
    assert not encoded.chunks[0].vectors
    assert len(encoded.warnings) == 1


@pytest.mark.parametrize("make", [EncoderTokenizer.clip_l, EncoderTokenizer.clip_g])
def test_too_few_positions_are_refused(make: Callable[..., EncoderTokenizer]) -> None:
    with pytest.raises(CheckpointError, match="2 positions"):
        make(positions=2)


def test_words_need_no_torch() -> None:
    code = "import sys, octavo.text; octavo.text.Tokenizers.released(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
