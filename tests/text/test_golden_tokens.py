"""The recorded tokens of 44 prompts: the ids, weights and chunks that ComfyUI makes of them.

All are met exactly, with two remarks. Five prompts hold compatibility characters, CJK, emoji or odd spaces; for these
the recording also has the ids of the older transformers 4 (`variants`). We meet the main ids, those of transformers 5,
which do not depend on whether ftfy is installed. And vectors of the wrong width for an encoder, which ComfyUI keeps
among the tokens and drops when encoding, are dropped here at once, so that weights stay with their words.
"""

import json
from typing import Any

import pytest
from safetensors import safe_open

from octavo.text.chunks import TokenChunk
from octavo.text.tokenizers import EmbeddingShapes, Tokenizers
from tests.goldens import golden

WIDTHS = {"clip_l": 768, "clip_g": 1280, "t5xxl": 4096}
CASES = 44


@pytest.fixture(scope="module")
def cases() -> list[dict[str, Any]]:
    recorded: list[dict[str, Any]] = json.loads(golden("comfyui/tokenizer.json").read_text())["cases"]
    return recorded


@pytest.fixture(scope="module")
def tokenizers() -> Tokenizers:
    return Tokenizers.released()


def shapes_of(name: str) -> EmbeddingShapes | None:
    path = golden("comfyui/embeddings") / f"{name}.safetensors"
    if not path.exists():
        return None
    with safe_open(path, "np") as file:
        return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118


def first_values(chunk: TokenChunk, position: int) -> list[float]:
    vector = chunk.vectors[position]
    with safe_open(golden("comfyui/embeddings") / f"{vector.name}.safetensors", "np") as file:
        values: list[float] = file.get_tensor(vector.key)[vector.row, :4].tolist()
    return values


def expected(chunk: dict[str, Any], width: int, minimum: int) -> tuple[list[Any], list[float]]:
    """The recorded ids and weights, without vectors of the wrong width, and padded again in their place."""
    weights = [1.0] * chunk["len"] if chunk["weights"] == "all 1.0" else chunk["weights"]
    kept = [
        (index, weight)
        for index, weight in zip(chunk["ids"], weights, strict=True)
        if not isinstance(index, dict) or index["embedding_vector_dim"] == width
    ]
    kept += [(chunk["ids"][-1], 1.0)] * (minimum - len(kept))
    return [index for index, _ in kept], [weight for _, weight in kept]


def test_all_recorded_prompts_are_compared(cases: list[dict[str, Any]]) -> None:
    assert len(cases) == CASES


@pytest.mark.parametrize("case", range(CASES))
def test_tokens_weights_and_chunks_are_those_recorded(
    case: int, cases: list[dict[str, Any]], tokenizers: Tokenizers
) -> None:
    tokens = tokenizers.encode(cases[case]["prompt"], embeddings=shapes_of)
    for encoder, chunks in (("clip_l", tokens.clip_l), ("clip_g", tokens.clip_g), ("t5xxl", tokens.t5)):
        assert chunks is not None
        assert len(chunks) == len(cases[case][encoder])
        for chunk, recorded in zip(chunks, cases[case][encoder], strict=True):
            ids, weights = expected(recorded, WIDTHS[encoder], minimum=77)
            got = [
                {"embedding_vector_dim": WIDTHS[encoder], "first4": first_values(chunk, position)}
                if position in chunk.vectors
                else index
                for position, index in enumerate(chunk.ids)
            ]
            assert got == ids
            assert list(chunk.weights) == weights


def test_an_embedding_that_does_not_exist_is_warned_of(cases: list[dict[str, Any]], tokenizers: Tokenizers) -> None:
    (case,) = [case for case in cases if case["prompt"] == "embedding:doesnotexist"]
    assert case["log"]
    (warning,) = tokenizers.encode(case["prompt"], embeddings=shapes_of).warnings
    assert "doesnotexist" in warning.text
