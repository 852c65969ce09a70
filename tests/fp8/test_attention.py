"""Attention in eight bits errs as its definition says, and the kernel is the definition on odd shapes."""

import math
import os

import pytest
import torch
from torch import Tensor

from octavo.fp8.attention import FP8, INT8, INT8_FP8, Rounded, attention_8bit, exact_attention

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
ALL = pytest.mark.parametrize("rounded", [FP8, INT8, INT8_FP8], ids=["fp8", "int8", "int8-fp8"])
HALF_A_STEP = 2.0**-4  # of e4m3fn, relative to a normal number
kernel = pytest.mark.skipif(
    not GPU and os.environ.get("TRITON_INTERPRET") != "1", reason="no GPU, and the interpreter is off"
)


def random(batch: int, queries: int, keys: int, heads: int, width: int = 64, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, queries, heads, width), (batch, keys, heads, width), (batch, keys, heads, width)]
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


@ALL
def test_errors_stay_within_half_steps(rounded: Rounded) -> None:
    """A logit errs by d at most, so a weight by the factor e^±d over its sum's e^±d; then p and v err by half a step.

    With q as small as here, e^2d - 1 is small, and the bound says something.
    """
    q, k, v = random(2, 70, 200, 2)
    q *= 0.02
    step = 1 / 127 if rounded.integers else 2 * HALF_A_STEP + HALF_A_STEP**2
    smooth = k - k.mean(1, keepdim=True)
    if rounded.integers:  # half a step of either, by its largest number, and both at once
        sizes = q.abs().amax(-1).amax(1)[:, None] * smooth.abs().sum(-1), q.abs().sum(-1), smooth.abs().amax((1, 3))
        logit = (sizes[0].amax(1) + (sizes[1].amax(1) * sizes[2])) * step / 2 * (1 + step)
    else:
        logit = (q.abs().sum(-1).amax(1) * smooth.abs().amax((1, 3))) * step
    d = logit * 64**-0.5
    weights = torch.exp(2 * d) - 1
    rest = 2 * HALF_A_STEP + HALF_A_STEP**2 + 1e-4 if rounded.weights else 1e-6
    bound = (weights + rest * (1 + weights)) * v.abs().amax((1, 3))
    error = (attention_8bit(q, k, v, rounded=rounded) - exact_attention(q, k, v)).abs()
    assert bound.max() < 2 < v.abs().max()
    assert (error.view(2, 70, 2, 64).amax((1, 3)) <= bound).all()


@ALL
def test_equal_keys_give_the_mean_of_the_values(rounded: Rounded) -> None:
    """Logits without k's mean are 0, so every weight is 1 exactly; and these values are exact in e4m3fn."""
    q, k, v = random(1, 33, 150, 2)
    k = k[:, :1].expand_as(k)
    v = torch.randint(-8, 8, v.shape).float() * 32
    v[:, 0] = 448.0
    expected = v.mean(1, keepdim=True).expand(-1, 33, -1, -1).flatten(2)
    assert torch.allclose(attention_8bit(q, k, v, rounded=rounded), expected, rtol=1e-5, atol=1e-3)


def test_a_mean_of_the_keys_costs_nothing() -> None:
    """It changes no softmax, and what is rounded is what is left without it."""
    q, k, v = random(1, 40, 90, 2)
    shifted = k + torch.linspace(-8, 8, 64)
    exact = exact_attention(q, k, v)
    assert torch.allclose(exact_attention(q, shifted, v), exact, atol=1e-4)
    errors = [float((attention_8bit(q, each, v) - exact).norm() / exact.norm()) for each in (k, shifted)]
    assert errors[1] == pytest.approx(errors[0], rel=0.1)


def test_integers_round_even_logits_finer() -> None:
    """Of numbers that are spread alike, 127 steps of the largest are finer than three bits after the point."""
    q, k, v = random(1, 64, 128, 2)
    exact = exact_attention(q, k, v)
    fp8, int8 = ((attention_8bit(q, k, v, rounded=each) - exact).norm() / exact.norm() for each in (FP8, INT8))
    assert int8 < fp8 / 2


@pytest.mark.parametrize("which", [0, 1, 2], ids=["q", "k", "v"])
@ALL
def test_nan_is_not_lost(rounded: Rounded, which: int) -> None:
    made = random(1, 5, 9, 1)
    made[which][0, 3, 0, 7] = math.nan
    out = attention_8bit(*made, rounded=rounded)
    assert out[0, 3].isnan().any()
    assert out.isnan().all() == (which == 1)


SHAPES = [(1, 1, 1, 1), (2, 17, 130, 2), (1, 130, 64, 1), (1, 40, 31, 3)]


@kernel
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@ALL
def test_the_kernel_is_the_definition(rounded: Rounded, shape: tuple[int, int, int, int]) -> None:
    """Sums differ in float32's last bits; where that moves a weight over the middle of a step, by a step of one."""
    pytest.importorskip("triton")
    from octavo.fp8.kernels.attention import Tile, attend

    q, k, v = (x.to(DEVICE) for x in random(*shape))
    if GPU:
        q, k, v = (x.half() for x in (q, k, v))
    expected = attention_8bit(q, k, v, rounded=rounded, keys=32).float()
    out = attend(q, k, v, rounded=rounded, tile=Tile(32, 32, 4, 2)).float()
    assert out.shape == expected.shape
    error = (out - expected).norm() / expected.norm()
    assert error < (2e-3 if GPU or rounded.weights else 1e-5)
    assert (out - expected).abs().max() <= HALF_A_STEP * v.float().abs().max() / min(8, shape[2])


@kernel
@ALL
def test_the_kernel_takes_strides_and_writes_nothing_beyond(rounded: Rounded) -> None:
    """As heads come from one qkv layer's output, and as some tokens of more."""
    pytest.importorskip("triton")
    from octavo.fp8.kernels.attention import Tile, attend

    packed = torch.randn(2, 60, 3, 2, 64, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    packed = packed.half() if GPU else packed
    q, k, v = packed[:, 5:50].unbind(2)
    apart = [x.contiguous() for x in (q, k, v)]
    tile = Tile(32, 32, 4, 2)
    assert torch.equal(attend(q, k, v, rounded=rounded, tile=tile), attend(*apart, rounded=rounded, tile=tile))
    assert attend(q[:, :0], k, v, rounded=rounded, tile=tile).shape == (2, 0, 128)


@kernel
@ALL
def test_the_kernel_keeps_masked_keys_out(rounded: Rounded) -> None:
    """Equal keys: each weighs the same, and none beyond the last weighs anything."""
    pytest.importorskip("triton")
    from octavo.fp8.kernels.attention import Tile, attend

    q, k, v = (x.to(DEVICE) for x in random(1, 9, 37, 2))
    k, v = k[:, :1].expand_as(k), torch.full_like(v, 448.0)
    if GPU:
        q, k, v = (x.half() for x in (q, k, v))
    out = attend(q, k, v, rounded=rounded, tile=Tile(32, 32, 4, 2))
    assert torch.allclose(out, torch.full_like(out, 448.0), rtol=1e-3 if GPU else 1e-6)


@kernel
@pytest.mark.filterwarnings("ignore:invalid value")  # the interpreter's, of infinity less infinity
@pytest.mark.parametrize("which", [0, 1, 2], ids=["q", "k", "v"])
@ALL
def test_the_kernel_loses_no_nan(rounded: Rounded, which: int) -> None:
    pytest.importorskip("triton")
    from octavo.fp8.kernels.attention import Tile, attend

    made = [x.to(DEVICE).half() if GPU else x for x in random(1, 5, 9, 1)]
    made[which][0, 3, 0, 7] = math.nan
    assert attend(*made, rounded=rounded, tile=Tile(32, 32, 4, 2))[0, 3].isnan().any()
