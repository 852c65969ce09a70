"""Words to numbers, without torch: prompt weights, chunks, CLIP's and T5's vocabularies.

Start reading in `tokenizers`. Turning the numbers into vectors is the work of `models`.
"""

from octavo.text.chunks import TokenChunk, Vector
from octavo.text.tokenizers import EncoderTokenizer, PromptWarning, TokenizedPrompt, Tokenizers
from octavo.text.vocabulary import Vocabulary, clip_vocabulary, read_vocabulary, t5_vocabulary
from octavo.text.words import word_level_tokenizer

__all__ = [
    "EncoderTokenizer",
    "PromptWarning",
    "TokenChunk",
    "TokenizedPrompt",
    "Tokenizers",
    "Vector",
    "Vocabulary",
    "clip_vocabulary",
    "read_vocabulary",
    "t5_vocabulary",
    "word_level_tokenizer",
]
