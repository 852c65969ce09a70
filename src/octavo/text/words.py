"""Vocabularies of whole words, for small models trained on captions that a program writes.

A released encoder cuts any text into pieces it knows. A small one cannot afford that: it knows a few hundred words, one
token each, and `Tokenizers.unknown_words` tells which words of a prompt are not among them. The vocabulary is an
ordinary file of the `tokenizers` library; `vocabulary.read_vocabulary` reads it as it reads the released ones.
"""

import string
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import NFKC, Lowercase, Normalizer, Replace
from tokenizers.normalizers import Sequence as NormalizerSequence
from tokenizers.pre_tokenizers import PreTokenizer, Split
from tokenizers.pre_tokenizers import Sequence as PreTokenizerSequence
from tokenizers.processors import TemplateProcessing

from octavo.errors import RequestError

LONGEST_CAPITALS = 40  # letters; bounds the look-around of the rules below, whose cost grows with its reach


def word_level_tokenizer(
    words: Iterable[str],
    *,
    start: str | None = "<start>",
    end: str = "<end>",
    pad: str = "<pad>",
    unknown: str = "<unknown>",
    letters: bool = False,
) -> Tokenizer:
    """A tokenizer that has one token for each of `words` and one for everything else.

    Text is lower-cased and split on white space, at punctuation and between letters and digits ("two2" is two words).
    Punctuation that is not among `words` leaves no token; any other unlisted word gives `unknown`.

    Args:
        words: lower-case words, numbers, or single signs such as "," in the order of their ids; repeats are dropped.
        start: token put before every text; None for none, as T5 has it.
        end: token put after every text.
        pad: token with id 0, which pads CLIP-G and T5.
        unknown: token for words that are not in the vocabulary.
        letters: a word of two or more capitals, such as HELLO, becomes one token per letter: "H", "E", "L", "L", "O".
            The letters "A" to "Z" are then part of the vocabulary and differ from the lower-case words "a" and "i".

    Returns:
        A tokenizer to be kept with `save(path)`; ids are pad, start, end, unknown, letters, words.

    Raises:
        RequestError: a word could never be met, because the splitting above would break or change it.
    """
    special = [token for token in (pad, start, end, unknown) if token is not None]
    alphabet = list(string.ascii_uppercase) if letters else []
    entries = list(dict.fromkeys([*special, *alphabet, *words]))
    ids = {token: index for index, token in enumerate(entries)}
    tokenizer = Tokenizer(WordLevel(ids, unk_token=unknown))
    tokenizer.normalizer = NormalizerSequence([NFKC(), *(_lower_all_but_capitals() if letters else [Lowercase()])])
    tokenizer.pre_tokenizer = _split_into_words(ids, letters=letters)
    for word in entries[len(special) + len(alphabet) :]:
        if tokenizer.encode(word).ids != [ids[word]]:
            raise RequestError(
                f"the word {word!r} would be read as {tokenizer.encode(word).tokens}, so no text can ever use it: "
                f"a word is lower-case letters, digits, or one sign. Split it, or leave it out."
            )
    tokenizer.post_processor = TemplateProcessing(
        single=f"{start} $A {end}" if start is not None else f"$A {end}",
        special_tokens=[(token, ids[token]) for token in (start, end) if token is not None],
    )
    return tokenizer


def _lower_all_but_capitals() -> list[Normalizer]:
    """Lower-case every ASCII letter except in words of two or more capitals.

    The library replaces a pattern by fixed text only, so there is one rule for each letter. A rule lower-cases its
    letter where the word holds a lower-case letter before or after it, or nothing else at all. Rules cannot disturb
    each other: each only adds lower-case letters to words that have some.
    """
    run = f"[A-Z]{{0,{LONGEST_CAPITALS}}}"
    return [
        Replace(
            Regex(f"(?<=[a-z]{run}){letter}|{letter}(?={run}[a-z])|(?<![A-Za-z]){letter}(?![A-Za-z])"), letter.lower()
        )
        for letter in string.ascii_uppercase
    ]


def _split_into_words(ids: dict[str, int], *, letters: bool) -> PreTokenizer:
    """White space and unlisted punctuation vanish; runs of letters, runs of digits and single signs remain."""
    signs = "".join(f"\\{sign}" for sign in string.punctuation if sign not in ids)
    listed = "".join(f"\\{sign}" for sign in string.punctuation if sign in ids)
    silent = f"[\\s\\p{{Cc}}\\p{{Cf}}{signs}]" + f"|[\\p{{P}}&&[^{listed}\\s]]"
    capital = "[A-Z]|" if letters else ""
    return PreTokenizerSequence(
        [
            Split(Regex(silent), "removed"),
            Split(Regex(f"{capital}[\\p{{L}}\\p{{M}}&&[^A-Z]]+|\\p{{N}}+|."), "isolated"),
        ]
    )
