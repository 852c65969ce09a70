"""Vocabularies: those in the package, and those that come with a model."""

import gzip
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.errors import CorruptFileError, ModelNotFoundError, OctavoError, UnsupportedFormatError
from octavo.text.vocabulary import Vocabulary, clip_vocabulary, read_vocabulary, t5_vocabulary
from octavo.text.words import word_level_tokenizer

SAMPLES = ("a cat, sitting on a MAT!", "it's 3.14", "", "猫 😀", "é\u0301 <|endoftext|>", "</s> x ")


def test_the_built_in_vocabularies_are_those_of_the_released_encoders() -> None:
    clip, t5 = clip_vocabulary(), t5_vocabulary()
    assert (clip.size, clip.before, clip.end) == (49408, (49406,), 49407)
    assert (t5.size, t5.before, t5.end) == (32100, (), 1)


@settings(deadline=None)
@given(st.text())
def test_clip_can_write_any_text_in_pieces(text: str) -> None:
    assert clip_vocabulary().unknown_words(text) == []
    assert all(0 <= index < 49408 for index in clip_vocabulary().ids(text))


def test_t5_says_which_parts_it_has_no_piece_for() -> None:
    assert t5_vocabulary().unknown_words("a 猫 and a 犬") == ["猫", "犬"]


def test_clip_ignores_case_and_white_space() -> None:
    assert clip_vocabulary().ids("  A \n\tCAT ") == clip_vocabulary().ids("a cat")


def test_t5_drops_white_space_at_the_end_only() -> None:
    ids = t5_vocabulary().ids
    assert ids("a cat \u00a0\n") == ids("a cat")
    assert ids(" ") == []
    assert ids("Cat") != ids("cat")


def save_clip_pairs(folder: Path) -> None:
    """As diffusers saves CLIP's vocabulary: vocab.json and merges.txt."""
    tokenizer = clip_vocabulary().tokenizer
    (folder / "vocab.json").write_text(json.dumps(tokenizer.get_vocab(with_added_tokens=True)), encoding="utf-8")
    packed = files("octavo.text").joinpath("vocab/clip_bpe_vocab_16e6.txt.gz").read_bytes()
    lines = gzip.decompress(packed).decode("utf-8").splitlines()
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")


def assert_equal(read: Vocabulary, built_in: Vocabulary) -> None:
    assert (read.before, read.end, read.unknown, read.size) == (
        built_in.before,
        built_in.end,
        built_in.unknown,
        built_in.size,
    )
    assert [read.ids(text) for text in SAMPLES] == [built_in.ids(text) for text in SAMPLES]


def test_clip_reads_the_same_from_a_diffusers_folder(tmp_path: Path) -> None:
    save_clip_pairs(tmp_path)
    assert_equal(read_vocabulary(tmp_path), clip_vocabulary())


def test_clip_reads_the_same_from_its_json(tmp_path: Path) -> None:
    clip_vocabulary().tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert_equal(read_vocabulary(tmp_path), clip_vocabulary())


def test_t5_reads_the_same_from_its_json(tmp_path: Path) -> None:
    packed = files("octavo.text").joinpath("vocab/t5_tokenizer.json.gz").read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(gzip.decompress(packed))
    assert_equal(read_vocabulary(tmp_path / "tokenizer.json"), t5_vocabulary())


@pytest.mark.parametrize("kind", ["RobertaProcessing", "BertProcessing"])
def test_other_post_processors_name_the_special_tokens_too(tmp_path: Path, kind: str) -> None:
    description = word_level_json()
    description["post_processor"] = {"type": kind, "sep": ["<end>", 2], "cls": ["<start>", 1]}
    if kind == "RobertaProcessing":
        description["post_processor"] |= {"trim_offsets": False, "add_prefix_space": False}
    vocabulary = read_vocabulary(write(tmp_path, description))
    assert (vocabulary.before, vocabulary.end) == ((1,), 2)


def test_a_file_s_own_truncation_and_padding_are_not_applied(tmp_path: Path) -> None:
    tokenizer = word_level_tokenizer(["a"])
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert read_vocabulary(tmp_path).ids("a a a") == [4, 4, 4]


def word_level_json() -> dict[str, Any]:
    description: dict[str, Any] = json.loads(word_level_tokenizer(["a", "red"], letters=True).to_str())
    return description


def write(folder: Path, description: object) -> Path:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(description), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "change",
    [
        {"post_processor": None},
        {"post_processor": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}},
        {"model": {"type": "WordLevel", "vocab": {"a": 0, "<start>": 1, "<end>": 2}, "unk_token": "<unk>"}},
        {"model": {"type": "WordLevel", "vocab": {"a": 0, "<unknown>": 1}, "unk_token": "<unknown>"}},
        {"model": {"type": "Unheard"}},
    ],
    ids=["no end token", "no special tokens", "no unknown token", "special tokens not in the table", "unheard model"],
)
def test_an_unusable_file_is_refused_with_a_remedy(tmp_path: Path, change: dict[str, Any]) -> None:
    path = write(tmp_path, word_level_json() | change)
    with pytest.raises(CorruptFileError, match=r"tokenizer\.json.*Save it anew"):
        read_vocabulary(path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"version": "1.0"}'])
def test_what_is_no_vocabulary_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "clip.tokenizer.json").write_bytes(content)
    with pytest.raises(CorruptFileError, match=r"clip\.tokenizer\.json"):
        read_vocabulary(tmp_path / "clip.tokenizer.json")


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_a_damaged_file_is_refused_or_works(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    whole = word_level_tokenizer(["a", "red", ","]).to_str().encode()
    at = data.draw(st.integers(0, len(whole) - 1))
    damaged = whole[:at] + data.draw(st.binary(max_size=4)) + whole[at + data.draw(st.integers(0, 40)) :]
    path = tmp_path_factory.getbasetemp() / "damaged.json"
    path.write_bytes(damaged)
    try:
        vocabulary = read_vocabulary(path)
    except OctavoError:
        return
    vocabulary.unknown_words("a RED, 猫 \x00")


@pytest.mark.parametrize("spoiled", ["vocab.json", "merges.txt"])
def test_damaged_pairs_are_refused(tmp_path: Path, spoiled: str) -> None:
    (tmp_path / "vocab.json").write_text('{"a": 0, "<|startoftext|>": 1, "<|endoftext|>": 2}')
    (tmp_path / "merges.txt").write_text("#version\n")
    (tmp_path / spoiled).write_text("x\ny z w\n")
    with pytest.raises(CorruptFileError, match=r"vocab\.json and merges\.txt"):
        read_vocabulary(tmp_path)


def test_a_folder_with_only_a_sentencepiece_model_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "spiece.model").write_bytes(b"")
    with pytest.raises(UnsupportedFormatError, match=r"spiece\.model.*built in"):
        read_vocabulary(tmp_path)


@pytest.mark.parametrize("name", ["", "absent"])
def test_nothing_to_read_says_what_was_expected(tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelNotFoundError, match=r"expected .*tokenizer\.json"):
        read_vocabulary(tmp_path / name)
