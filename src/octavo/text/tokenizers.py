"""From a prompt to the tokens of SD3's three encoders: the whole way, on one page.

    prompt ─ prompt.parse_weights ─▶ segments ─ vocabulary.ids ─▶ groups of tokens ─ chunks ─▶ TokenChunks

CLIP-L and CLIP-G read chunks as long as their table of positions (77), T5 one text of any length, padded to at least as
many tokens. Turning chunks into vectors, and applying their weights, is done where the encoders are.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from octavo.errors import CheckpointError
from octavo.text.chunks import Token, TokenChunk, Vector, complete, cut_into_chunks
from octavo.text.prompt import Reference, Segment, parse_weights, split_references
from octavo.text.vocabulary import Vocabulary, clip_vocabulary, t5_vocabulary

ENCODERS = ("clip_l", "clip_g", "t5xxl")

EmbeddingShapes: TypeAlias = Mapping[str, tuple[int, int]]
"""Of one embedding file: (vectors, width) of each tensor by its key, in the file's order."""

Embeddings: TypeAlias = Callable[[str], EmbeddingShapes | None]
"""Finds an embedding by its name, without suffix; None where there is none. The name is the user's word: a finder that
looks for files must not let it leave their folder. A dictionary's `get` will do."""


@dataclass(frozen=True, slots=True)
class PromptWarning:
    """Something in the prompt that was left out."""

    embedding: str
    encoder: str | None  # None: every encoder
    text: str  # for the user


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderTokens:
    """A prompt as one encoder reads it."""

    chunks: tuple[TokenChunk, ...]  # at least one
    warnings: tuple[PromptWarning, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizedPrompt:
    """A prompt as the three encoders read it; None for an encoder that is missing."""

    clip_l: tuple[TokenChunk, ...] | None
    clip_g: tuple[TokenChunk, ...] | None  # as many chunks as clip_l: the two stand side by side
    t5: tuple[TokenChunk, ...] | None  # always one chunk
    warnings: tuple[PromptWarning, ...] = ()

    @property
    def weighted(self) -> bool:
        """Whether any weight differs from 1, so that an empty prompt must be encoded as well."""
        given = (self.clip_l or ()) + (self.clip_g or ()) + (self.t5 or ())
        return any(chunk.weighted for chunk in given)


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderTokenizer:
    """Prompts to chunks for one encoder."""

    encoder: str  # its name in embedding files: clip_l, clip_g or t5xxl
    vocabulary: Vocabulary
    pad: int
    length: int | None = None  # of every chunk; None: one chunk of any length
    minimum: int = 1  # length of the shortest chunk
    width: int | None = None  # of the encoder's vectors, against which embeddings are checked; None: unchecked

    def __post_init__(self) -> None:
        needed = len(self.vocabulary.before) + 2
        if self.length is not None and self.length < needed:
            raise CheckpointError(
                f"{self.encoder} has {self.length} positions; start, one word and end need {needed}. "
                f"Check that the file is a text encoder."
            )

    @classmethod
    def clip_l(
        cls, vocabulary: Vocabulary | None = None, *, positions: int = 77, width: int | None = 768
    ) -> "EncoderTokenizer":
        """For CLIP-L, which pads with its end token; None takes CLIP's own vocabulary."""
        vocabulary = vocabulary or clip_vocabulary()
        return cls(encoder="clip_l", vocabulary=vocabulary, pad=vocabulary.end, length=positions, width=width)

    @classmethod
    def clip_g(
        cls, vocabulary: Vocabulary | None = None, *, positions: int = 77, width: int | None = 1280
    ) -> "EncoderTokenizer":
        """For CLIP-G, which pads with 0; None takes CLIP's own vocabulary."""
        vocabulary = vocabulary or clip_vocabulary()
        return cls(encoder="clip_g", vocabulary=vocabulary, pad=0, length=positions, width=width)

    @classmethod
    def t5(
        cls, vocabulary: Vocabulary | None = None, *, minimum: int = 77, width: int | None = 4096
    ) -> "EncoderTokenizer":
        """For T5, which pads with 0 to at least `minimum` tokens; None takes the vocabulary of T5 v1.1."""
        return cls(encoder="t5xxl", vocabulary=vocabulary or t5_vocabulary(), pad=0, minimum=minimum, width=width)

    def encode(self, prompt: str, embeddings: Embeddings | None = None) -> EncoderTokens:
        """Tokenize a prompt with its weights; never raises, whatever the text."""
        warnings: list[PromptWarning] = []
        groups = [
            group
            for segment in parse_weights(prompt)
            for group in self._groups(segment, embeddings or _no_embeddings, warnings)
        ]
        before, end = self.vocabulary.before, self.vocabulary.end
        room = None if self.length is None else self.length - len(before) - 1
        chunks = tuple(
            complete(content, before=before, end=end, pad=self.pad, length=self.length or self.minimum)
            for content in cut_into_chunks(groups, room)
        )
        return EncoderTokens(chunks=chunks, warnings=tuple(dict.fromkeys(warnings)))

    def unknown_words(self, prompt: str) -> list[str]:
        """Words of the prompt, as typed, that this encoder has no token for; each once, in order."""
        found: dict[str, None] = {}
        for segment in parse_weights(prompt):
            for part in split_references(segment.text, known=lambda _: False):
                if isinstance(part, str):
                    found |= dict.fromkeys(self.vocabulary.unknown_words(part))
        return list(found)

    def _groups(self, segment: Segment, embeddings: Embeddings, warnings: list[PromptWarning]) -> Iterator[list[Token]]:
        for part in split_references(segment.text, known=lambda name: embeddings(name) is not None):
            if isinstance(part, Reference):
                yield self._vectors(part.name, segment.weight, embeddings(part.name), warnings)
            else:
                yield [Token(index, segment.weight) for index in self.vocabulary.ids(part)]

    def _vectors(
        self, name: str, weight: float, shapes: EmbeddingShapes | None, warnings: list[PromptWarning]
    ) -> list[Token]:
        if shapes is None:
            warnings.append(PromptWarning(name, None, f"there is no embedding '{name}'; it is left out of the prompt"))
            return []
        # Files made for a single encoder keep their vectors under a name of their own, such as emb_params.
        key = self.encoder if self.encoder in shapes else next((key for key in shapes if key not in ENCODERS), None)
        if key is None:
            text = (
                f"embedding '{name}' has vectors for {', '.join(shapes)} only; {self.encoder} reads the prompt without"
            )
            warnings.append(PromptWarning(name, self.encoder, text))
            return []
        count, width = shapes[key]
        if self.width is not None and width != self.width:
            text = f"embedding '{name}' is {width} wide, {self.encoder} {self.width}; it reads the prompt without it"
            warnings.append(PromptWarning(name, self.encoder, text))
            return []
        return [Token(0, weight, Vector(name, key, row)) for row in range(count)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokenizers:
    """The tokenizers of SD3's three encoders; None for an encoder that is missing."""

    clip_l: EncoderTokenizer | None = None
    clip_g: EncoderTokenizer | None = None
    t5: EncoderTokenizer | None = None

    @classmethod
    def released(cls) -> "Tokenizers":
        """Those of the released models, from the vocabularies in the package."""
        return cls(clip_l=EncoderTokenizer.clip_l(), clip_g=EncoderTokenizer.clip_g(), t5=EncoderTokenizer.t5())

    def encode(
        self,
        prompt: str,
        *,
        prompt_clip_g: str | None = None,
        prompt_t5: str | None = None,
        embeddings: Embeddings | None = None,
    ) -> TokenizedPrompt:
        """Tokenize a prompt for every encoder; never raises, whatever the text.

        Args:
            prompt: for all encoders that are not given their own.
            prompt_clip_g, prompt_t5: what CLIP-G and T5 read instead; None for the same, "" for nothing.
            embeddings: finds textual-inversion embeddings; without it there are none.

        Returns:
            Chunks for each encoder. Where CLIP-L and CLIP-G come to unlike numbers of chunks, empty ones fill up.
        """
        clip_l = _read(self.clip_l, prompt, embeddings)
        clip_g = _read(self.clip_g, prompt if prompt_clip_g is None else prompt_clip_g, embeddings)
        t5 = _read(self.t5, prompt if prompt_t5 is None else prompt_t5, embeddings)
        count = max(len(clip_l.chunks) if clip_l else 0, len(clip_g.chunks) if clip_g else 0)
        warnings = [warning for read in (clip_l, clip_g, t5) if read for warning in read.warnings]
        return TokenizedPrompt(
            clip_l=_fill_up(self.clip_l, clip_l, count),
            clip_g=_fill_up(self.clip_g, clip_g, count),
            t5=t5.chunks if t5 else None,
            warnings=tuple(dict.fromkeys(warnings)),
        )

    def unknown_words(self, prompt: str) -> list[str]:
        """Words of the prompt, as typed, that none of the encoders has a token for; each once, in order."""
        tokenizers = [tokenizer for tokenizer in (self.clip_l, self.clip_g, self.t5) if tokenizer]
        unknown = [tokenizer.unknown_words(prompt) for tokenizer in tokenizers]
        return [word for word in unknown[0] if all(word in words for words in unknown)] if unknown else []


def _read(tokenizer: EncoderTokenizer | None, prompt: str, embeddings: Embeddings | None) -> EncoderTokens | None:
    return tokenizer.encode(prompt, embeddings) if tokenizer else None


def _fill_up(
    tokenizer: EncoderTokenizer | None, read: EncoderTokens | None, count: int
) -> tuple[TokenChunk, ...] | None:
    """The chunks read, followed by empty ones up to `count`."""
    if tokenizer is None or read is None:
        return None
    missing = count - len(read.chunks)
    return read.chunks + tokenizer.encode("").chunks * missing if missing else read.chunks


def _no_embeddings(_name: str) -> None:
    """The finder of whoever has no embeddings."""
