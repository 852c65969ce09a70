"""Vocabularies: text to ids, on the `tokenizers` library.

CLIP's and T5's own come with the package, so that whoever has only weight files needs no download. Others are read from
a `tokenizers` JSON file or a folder as diffusers saves it. Weights, chunks and padding are in `tokenizers` beside this.

CLIP's text is NFC-normalised, its white space collapsed, and lower-cased; it is not repaired with ftfy. This is what
ComfyUI and diffusers do today (transformers 5, whether ftfy is installed or not), and it gives every machine the same
ids. Ligatures, full-width letters and curly quotes, which ftfy would have rewritten before CLIP's training, therefore
keep their own ids.
"""

import gzip
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.models import BPE, Unigram
from tokenizers.normalizers import NFC, Lowercase, Replace, Strip
from tokenizers.normalizers import Sequence as NormalizerSequence
from tokenizers.pre_tokenizers import ByteLevel, Split
from tokenizers.pre_tokenizers import Sequence as PreTokenizerSequence
from tokenizers.processors import TemplateProcessing

from octavo.errors import CorruptFileError, ModelNotFoundError, UnsupportedFormatError

CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"
T5_END = 1  # id of "</s>"

# Words, single digits and runs of signs, with English contractions split off; Radford et al. 2021's own rule.
_CLIP_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"

_RARE = "q\u0378"  # a letter, and a code point that means nothing: every model can tell whether it copes


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A tokenizer of the `tokenizers` library, and the ids that its encoder wants around a text."""

    tokenizer: Tokenizer
    before: tuple[int, ...]  # CLIP: the start token; T5: nothing
    end: int
    unknown: int | None  # None where any text can be written in pieces

    @property
    def size(self) -> int:
        """Rows that the encoder's table of token vectors must have at least."""
        return 1 + max(self.tokenizer.get_vocab(with_added_tokens=True).values())

    def ids(self, text: str) -> list[int]:
        """Ids of the text alone, without special tokens around it. No lone surrogates, please."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def unknown_words(self, text: str) -> list[str]:
        """Parts of the text, as typed, that the vocabulary has no token for; each once, in order."""
        if self.unknown is None:
            return []
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        spans = [span for index, span in zip(encoding.ids, encoding.offsets, strict=True) if index == self.unknown]
        words = dict.fromkeys(text[begin:end].strip() for begin, end in spans)
        return [word for word in words if word]


@cache
def clip_vocabulary() -> Vocabulary:
    """CLIP's 49,408 byte pairs, shared by CLIP-L and CLIP-G.

    Ids: 256 bytes, the same at a word's end, the merges, start, end. Source: Radford et al. 2021 (arXiv 2103.00020).
    """
    with (
        files("octavo.text").joinpath("vocab/clip_bpe_vocab_16e6.txt.gz").open("rb") as packed,
        gzip.open(packed, "rt", encoding="utf-8") as lines,
    ):
        merges = _merges(lines)
    characters = _characters_of_bytes()
    pieces = [*characters, *(character + "</w>" for character in characters), *("".join(pair) for pair in merges)]
    ids = {piece: index for index, piece in enumerate([*pieces, CLIP_START, CLIP_END])}
    return _vocabulary(_clip_tokenizer(ids, merges), (ids[CLIP_START], ids[CLIP_END]))


@cache
def t5_vocabulary() -> Vocabulary:
    """T5 v1.1's 32,100 pieces. Source: Raffel et al. 2020 (arXiv 1910.10683)."""
    packed = files("octavo.text").joinpath("vocab/t5_tokenizer.json.gz").read_bytes()
    return _vocabulary(Tokenizer.from_buffer(gzip.decompress(packed)), (T5_END,))


def read_vocabulary(path: Path) -> Vocabulary:
    """Read a vocabulary that comes with a model.

    Args:
        path: a `tokenizers` JSON file; or a folder with `tokenizer.json`, or with CLIP's `vocab.json` and `merges.txt`.

    Raises:
        ModelNotFoundError: nothing there, or none of these files.
        UnsupportedFormatError: only a sentencepiece model.
        CorruptFileError: not such a file, or it names no end token.
    """
    if not path.exists():
        raise ModelNotFoundError(f"there is no vocabulary at {path}: expected a tokenizer.json or a folder with one")
    if path.is_file():
        return _read_json(path)
    if (path / "tokenizer.json").is_file():
        return _read_json(path / "tokenizer.json")
    if (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
        return _read_pairs(path)
    if (path / "spiece.model").is_file():
        raise UnsupportedFormatError(
            f"{path} holds its vocabulary only as spiece.model, which Octavo does not read. For T5 v1.1 leave the "
            f"folder out: its vocabulary is built in. Otherwise save a tokenizer.json with transformers."
        )
    raise ModelNotFoundError(f"{path} holds no vocabulary: expected tokenizer.json, or vocab.json with merges.txt")


def _read_json(path: Path) -> Vocabulary:
    try:
        text = path.read_text(encoding="utf-8")
        around = _tokens_around(json.loads(text)["post_processor"])
        return _vocabulary(Tokenizer.from_str(text), around)
    except Exception as broken:  # the library raises bare Exception for whatever is wrong with a file
        raise CorruptFileError(
            f"{path} is not a vocabulary of the `tokenizers` library that puts an end token after a text, as T5's, or "
            f"a start and an end around it, as CLIP's ({type(broken).__name__}: {broken}). Save it anew, or remove it."
        ) from broken


def _read_pairs(folder: Path) -> Vocabulary:
    try:
        ids = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        with (folder / "merges.txt").open(encoding="utf-8") as lines:
            return _vocabulary(_clip_tokenizer(ids, _merges(lines)), (ids[CLIP_START], ids[CLIP_END]))
    except Exception as broken:  # as above
        raise CorruptFileError(
            f"vocab.json and merges.txt in {folder} are not a CLIP vocabulary ({type(broken).__name__}: {broken}). "
            f"Fetch them anew, or remove them."
        ) from broken


def _tokens_around(post_processor: Any) -> tuple[int, ...]:
    """The ids that a post-processor, as JSON, puts before and after a text; the last is the end token.

    Read from the JSON, because a faulty template makes the library abort instead of raising.
    """
    match post_processor:
        case {"type": "RobertaProcessing" | "BertProcessing", "cls": [_, int(start)], "sep": [_, int(end)]}:
            return start, end
        case {"type": "TemplateProcessing", "single": [*pieces], "special_tokens": special}:
            names = [piece["SpecialToken"]["id"] for piece in pieces if "SpecialToken" in piece]
            return tuple(index for name in names for index in special[name]["ids"])
        case {"type": "Sequence", "processors": [*_, last]}:
            return _tokens_around(last)
    raise ValueError("no post-processor that adds tokens")


def _vocabulary(tokenizer: Tokenizer, around: tuple[int, ...]) -> Vocabulary:
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if isinstance(tokenizer.model, Unigram):
        # White space at the end of a text must not become a piece of its own; sentencepiece trims it, too.
        given = [] if tokenizer.normalizer is None else [tokenizer.normalizer]
        tokenizer.normalizer = NormalizerSequence([*given, Strip(left=False, right=True)])
    tokenizer.encode(_RARE, add_special_tokens=False)  # fails now rather than later if there is no unknown token
    if not 1 <= len(around) <= 2 or any(tokenizer.id_to_token(index) is None for index in around):
        raise ValueError(f"tokens around a text: {around}")
    unknown = tokenizer.token_to_id(getattr(tokenizer.model, "unk_token", None) or "<unk>")
    return Vocabulary(tokenizer, around[:-1], around[-1], None if unknown == around[-1] else unknown)


def _clip_tokenizer(ids: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    tokenizer = Tokenizer(
        BPE(ids, merges, continuing_subword_prefix="", end_of_word_suffix="</w>", unk_token=CLIP_END, fuse_unk=False)
    )
    tokenizer.normalizer = NormalizerSequence([NFC(), Replace(Regex(r"\s+"), " "), Lowercase()])
    tokenizer.pre_tokenizer = PreTokenizerSequence(
        [Split(Regex(_CLIP_WORDS), "removed", invert=True), ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    special = [(token, ids[token]) for token in (CLIP_START, CLIP_END)]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token, _ in special])
    tokenizer.post_processor = TemplateProcessing(single=f"{CLIP_START} $A {CLIP_END}", special_tokens=special)
    return tokenizer


def _merges(lines: Iterable[str]) -> list[tuple[str, str]]:
    """Pairs of a merges file, whose first line is a header."""
    pairs = []
    for line in islice(lines, 1, None):
        if line.strip():
            left, right = line.split()
            pairs.append((left, right))
    return pairs


def _characters_of_bytes() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary, in the order of CLIP's ids.

    Bytes that are printable in Latin-1 stand for themselves and come first; the others follow as U+0100 and on.
    Source: Radford et al. 2019, GPT-2.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in printable] + [chr(256 + rank) for rank in range(256 - len(printable))]
