"""Attention is the definition's, however it is computed, and no row of a batch depends on its company."""

import pytest
import torch
from torch import Tensor

from octavo.models import attention as attention_module
from octavo.models.attention import attention


def definition(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(q k^T · scale) v in float64, heads joined."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    return ((q @ k.mT * scale).softmax(-1) @ v).transpose(1, 2).flatten(2)


def random(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    made = torch.randn(3, *shape, generator=torch.Generator().manual_seed(seed))
    return made[0], made[1], made[2]


@pytest.mark.parametrize(("batch", "length", "heads"), [(1, 1, 1), (2, 7, 3), (3, 104, 3), (5, 300, 2), (1, 600, 1)])
@pytest.mark.parametrize("scale", [None, 0.5])
def test_it_is_the_definition(batch: int, length: int, heads: int, scale: float | None) -> None:
    """Weights sum to 1, so that an error stays near float32's rounding of values of size 1 to 5."""
    q, k, v = random(batch, length, heads, 16)
    expected = definition(q, k, v, 16**-0.5 if scale is None else scale)
    assert (attention(q, k, v, scale=scale).double() - expected).abs().max() < 1e-5


def test_keys_may_be_fewer_than_queries() -> None:
    q, k, v = random(2, 30, 3, 16)
    expected = definition(q, k[:, :11], v[:, :11], 0.25)
    assert (attention(q, k[:, :11], v[:, :11]).double() - expected).abs().max() < 1e-5


@pytest.mark.parametrize("at_once", [1, 40 * 40 * 4, 1 << 20])
def test_rows_do_not_depend_on_their_company(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    """However many heads are computed at once: bit for bit."""
    q, k, v = random(6, 40, 3, 16)
    alone = [attention(*(x[i : i + 1] for x in (q, k, v))) for i in range(6)]
    monkeypatch.setattr(attention_module, "AT_ONCE", at_once)
    assert torch.equal(attention(q, k, v), torch.cat(alone))


def test_few_tokens_are_multiplied_out_and_many_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[int] = []

    def few(q: Tensor, _k: Tensor, _v: Tensor, _scale: float) -> Tensor:
        used.append(q.shape[1])
        return q.flatten(2)

    monkeypatch.setattr(attention_module, "_few_tokens", few)
    for length in (8, 512, 513):
        attention(*random(1, length, 1, 8))
    attention(*random(1, 8, 1, 8), causal=True)
    attention(*(x.bfloat16() for x in random(1, 9, 1, 8)))
    attention(*random(1, 10, 1, 8), bias=torch.zeros(1, 1, 10, 10))
    assert used == [8, 512]


@pytest.mark.gradients
def test_gradients_flow() -> None:
    q, k, v = (x.requires_grad_() for x in random(1, 8, 2, 8))
    attention(q, k, v).sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in (q, k, v))
