"""Fused Triton kernels do what their definitions say, on odd shapes and awkward numbers; without a GPU, interpreted."""

import os

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.fp8 import E4M3FN, Scaled, dequantize, quantize
from octavo.fp8.modulate import DEFINITIONS, Kernels, Stream, Taker, triton_kernels
from octavo.fp8.scale import Form

pytest.importorskip("triton", reason="triton is not installed")

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
FORMS: tuple[Form, ...] = ("e4m3fn", "int8")
ROOT = (2 / torch.pi) ** 0.5

pytestmark = [
    pytest.mark.skipif(
        not GPU and os.environ.get("TRITON_INTERPRET") != "1", reason="no GPU, and the interpreter is off"
    ),
    # The interpreter computes by numpy, which remarks on what a GPU does without a word.
    pytest.mark.filterwarnings("ignore:(overflow|invalid value|All-NaN slice) encountered:RuntimeWarning"),
]


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return triton_kernels()


def tokens(B: int, L: int, D: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of sizes from 1/100 to 100, none of mean 0."""
    generator = torch.Generator().manual_seed(B + L + D)
    sizes = torch.logspace(-2, 2, B * L).view(B, L, 1)
    return ((torch.randn(B, L, D, generator=generator) + 0.3) * sizes).to(DEVICE, dtype)


def table(B: int, chunks: int, D: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[B, chunks, D] amid a wider one, as a model's tables of modulation lie."""
    generator = torch.Generator().manual_seed(D)
    return torch.randn(B, chunks + 3, D, generator=generator).to(DEVICE, dtype)[:, 2 : 2 + chunks]


def half_a_step(y: Tensor, scale: Tensor, form: Form) -> Tensor:
    """How far the nearest number of 8 bits may be from y."""
    return scale / 2 if form == "int8" else torch.maximum(y.abs() * 2.0**-4, scale * E4M3FN.smallest / 2)


def check_rows(rows: Scaled, y: Tensor, slack: Tensor, form: Form, largest: float) -> None:
    """Rows [M, K] hold y, float64, each with its own scale, up to rounding and `slack` [M, K] of float32."""
    scale = rows.scale.double()
    expected = y.abs().amax(1, keepdim=True) / largest
    assert ((scale - expected).abs() <= expected * 2.0**-22 + slack.amax(1, keepdim=True) / largest).all()
    error = (rows.q.double() * scale - y).abs()
    assert (error <= half_a_step(y, scale, form) * (1 + 2.0**-18) + slack * (1 + 2.0**-3)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 70), (1, 2, 1100), (3, 1, 5)], ids=str)
def test_norm_and_modulation_are_off_by_half_a_step_at_most(
    kernels: Kernels, dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    """Against float64; the slack is float32's: some ten roundings of numbers no larger than those summed up here."""
    B, L, D = shape
    x, vectors = tokens(*shape, dtype), table(B, 6, D, dtype) * 0.5
    forms: tuple[Form | None, ...] = ("e4m3fn", "int8", None)
    takers = [Taker(vectors[:, 2 * i], vectors[:, 2 * i + 1], form) for i, form in enumerate(forms)]
    normed = F.layer_norm(x.double(), (D,), eps=1e-6)
    for taker, rows in zip(takers, kernels.modulated(x, *takers), strict=True):
        shift, scale = taker.shift.double()[:, None], 1 + taker.scale.double()[:, None]
        y = (normed * scale + shift).view(B * L, D)
        # The mean of a row is taken off all of it: its rounding counts in units of the row's deviation.
        lost = x.double().mean(2, keepdim=True).abs() / (x.double().var(2, correction=0, keepdim=True) + 1e-6).sqrt()
        slack = (((normed.abs() + lost) * scale.abs() + shift.abs()) * 2.0**-20).view(B * L, D)
        if taker.form is None:
            assert isinstance(rows, Tensor)
            assert rows.dtype == dtype
            assert rows.shape == x.shape
            ulp = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}[dtype]
            small = 2.0**-24 if dtype == torch.float16 else 0.0
            assert ((rows.view(B * L, D).double() - y).abs() <= slack + y.abs() * ulp + small).all()
        else:
            assert isinstance(rows, Scaled)
            check_rows(rows, y, slack, taker.form, 448.0 if taker.form == "e4m3fn" else 127.0)


@pytest.mark.parametrize("form", FORMS)
def test_codes_are_the_definitions_but_where_float32_decides_a_tie(kernels: Kernels, form: Form) -> None:
    x, vectors = tokens(2, 4, 1500), table(2, 2, 1500) * 0.3
    taker = Taker(vectors[:, 0], vectors[:, 1], form)
    for ours, theirs in (
        (kernels.modulated(x, taker)[0], DEFINITIONS.modulated(x, taker)[0]),
        (kernels.gelu(x / 50, form, None), DEFINITIONS.gelu(x / 50, form, None)),
    ):
        assert isinstance(ours, Scaled)
        assert isinstance(theirs, Scaled)
        assert torch.allclose(ours.scale, theirs.scale, rtol=1e-6, atol=0)
        assert (ours.q.float() != theirs.q.float()).float().mean() < 1e-3


@pytest.mark.parametrize("each_row", [False, True])
def test_calibrated_scales_hold_and_clamp(kernels: Kernels, each_row: bool) -> None:
    """Powers of two divide without rounding; INT8 has no use for a scale that was calibrated for FP8."""
    x, vectors = tokens(2, 3, 130), table(2, 2, 130)
    scale = torch.tensor(2.0**-8, device=DEVICE)  # 1.75 is the largest number
    if each_row:
        scale = 2.0 ** -torch.arange(5.0, 11.0, device=DEVICE)[:, None]
    taker = Taker(vectors[:, 0], vectors[:, 1], "e4m3fn", scale)
    (rows,), (expected,) = kernels.modulated(x, taker), DEFINITIONS.modulated(x, taker)
    assert isinstance(rows, Scaled)
    assert isinstance(expected, Scaled)
    assert torch.equal(rows.scale, scale)
    assert (rows.q.float().abs() == 448).any()
    assert (rows.q.float() != expected.q.float()).float().mean() < 5e-3
    of_gelu = kernels.gelu(x, "e4m3fn", scale)
    assert torch.equal(of_gelu.scale, scale)
    assert (of_gelu.q.float() != DEFINITIONS.gelu(x, "e4m3fn", scale).q.float()).float().mean() < 5e-3
    assert torch.equal(kernels.gelu(x, "int8", scale).scale, kernels.gelu(x, "int8", None).scale)


@pytest.mark.parametrize("form", [*FORMS, None])
def test_rows_may_lie_anywhere_and_each_token_may_have_its_vector(kernels: Kernels, form: Form | None) -> None:
    """Strides and the sharing of vectors change where numbers are read, not one bit of what is made of them."""
    B, L, D = 2, 3, 70
    wide, vectors = tokens(B, 2 * L, D + 7), table(B, 3, D)
    x, branch = wide[:, ::2, :D], wide[:, 1::2, 7:]
    shift, scale, gate = vectors.unbind(1)
    by_token = [each[:, None].expand(B, L, D).contiguous() for each in (shift, scale, gate)]
    together = kernels.residual_modulated(x, gate, branch, Taker(shift, scale, form))
    dense = kernels.residual_modulated(
        x.contiguous(), by_token[2], branch.contiguous(), Taker(by_token[0], by_token[1], form)
    )
    assert torch.equal(together[0], dense[0])
    assert torch.equal(_bits(together[1]), _bits(dense[1]))
    columns = x.transpose(0, 2).contiguous().transpose(0, 2)  # numbers of a row apart
    taker = Taker(shift, scale, form)
    assert torch.equal(_bits(kernels.modulated(columns, taker)[0]), _bits(kernels.modulated(x, taker)[0]))
    assert torch.equal(kernels.residual(x, gate, branch), dense[0])


def _bits(rows: Scaled | Tensor) -> Tensor:
    return rows if isinstance(rows, Tensor) else torch.cat([rows.q.float(), rows.scale], dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_fused_residual_is_the_steps_one_after_the_other(kernels: Kernels, dtype: torch.dtype) -> None:
    """The norm sees the sum as it was rounded, so taking both at once changes no bit."""
    x, branch, vectors = tokens(2, 3, 90, dtype), tokens(2, 3, 90, dtype).flip(1), table(2, 3, 90, dtype)
    taker = Taker(vectors[:, 0], vectors[:, 1], "e4m3fn")
    new, rows = kernels.residual_modulated(x, vectors[:, 2], branch, taker)
    assert torch.equal(new, kernels.residual(x, vectors[:, 2], branch))
    assert torch.equal(_bits(rows), _bits(kernels.modulated(new, taker)[0]))
    exact = x.double() + vectors[:, 2].double()[:, None] * branch.double()
    size = x.double().abs() + (vectors[:, 2].double()[:, None] * branch.double()).abs()
    ulp = 2.0**-11 if dtype == torch.float16 else 2.0**-24
    assert ((new.double() - exact).abs() <= exact.abs() * ulp + size * 2.0**-23 + 2.0**-25).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("columns", [1, 300, 2100])
def test_gelu_is_off_by_half_a_step_at_most(kernels: Kernels, columns: int, form: Form) -> None:
    """Rows of all sizes; the last two hold nothing that GELU leaves positive, so that the dip decides their scale."""
    x = tokens(1, 6, columns).view(6, columns)
    x[4], x[5] = -x[4].abs() - 1e-3, -(x[5].abs() % 3)
    x = x.half()
    y = x.double() / (1 + (-2 * ROOT * (x.double() + 0.044715 * x.double() ** 3)).exp())
    slack = x.double().abs().clamp(max=12) * 2.0**-20 * (y.abs() > 0)
    check_rows(kernels.gelu(x.to(DEVICE), form, None), y, slack, form, 448.0 if form == "e4m3fn" else 127.0)


def test_the_depth_of_the_dip_is_known() -> None:
    from octavo.fp8.kernels.gelu import DIP

    x = torch.linspace(-3, 0, 300_001, dtype=torch.float64)
    depth = -float(F.gelu(x, approximate="tanh").min())
    assert depth < getattr(DIP, "value", DIP) < depth * 1.001


@pytest.mark.parametrize("form", FORMS)
def test_rows_of_zeros_and_huge_numbers_stay_finite(kernels: Kernels, form: Form) -> None:
    x = torch.zeros(1, 4, 40, device=DEVICE)
    x[0, 1], x[0, 2], x[0, 3] = 3e4, torch.linspace(-1e18, 1e18, 40), torch.linspace(-6e4, 6e4, 40)
    none = torch.zeros(1, 40, device=DEVICE)
    (rows,) = kernels.modulated(x, Taker(none, none, form))
    assert isinstance(rows, Scaled)
    assert rows.scale[:2].flatten().tolist() == [1.0, 1.0]  # a row of one number has no deviation
    assert not rows.q[:2].float().any()
    assert torch.isfinite(dequantize(rows)).all()
    assert rows.q.float().abs().amax(1).tolist()[2:] == [448.0 if form == "e4m3fn" else 127.0] * 2
    of_gelu = kernels.gelu(x.view(4, 40), form, None)
    assert torch.isfinite(dequantize(of_gelu)).all()
    assert of_gelu.scale[0] == 1.0


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_seen_in_its_row_and_in_no_other(kernels: Kernels, form: Form, bad: float) -> None:
    from octavo.fp8.kernels.quantize import quantize_rows

    x, none = tokens(1, 3, 50), torch.zeros(1, 50, device=DEVICE)
    x[0, 1, 7] = bad
    ways = [kernels.modulated(x, Taker(none, none, form))[0], quantize_rows(x[0], form=form)]
    ways.append(kernels.gelu(x[0], form, None))
    for rows in ways:
        assert isinstance(rows, Scaled)
        sums = dequantize(rows).sum(1)  # as a product of finite weights would see it
        assert torch.isfinite(sums).tolist() == [True, False, True]
    if bad != bad and form == "e4m3fn":  # with a scale given, the code itself has to tell
        given = torch.tensor(0.5, device=DEVICE)
        for rows in (kernels.modulated(x, Taker(none, none, form, given))[0], kernels.gelu(x[0], form, given)):
            assert isinstance(rows, Scaled)
            assert torch.isnan(rows.q.float()).any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("lengths", [(5,), (3, 40)], ids=str)
@pytest.mark.parametrize("normed", [True, False])
def test_heads_of_all_streams_lie_side_by_side(
    kernels: Kernels, dtype: torch.dtype, lengths: tuple[int, ...], normed: bool
) -> None:
    """Queries and keys may differ by the rounding of a mean of squares; values are copied."""
    B, H, E = 2, 3, 20
    streams = []
    for i, length in enumerate(lengths):
        weights = [torch.rand(E, device=DEVICE, dtype=dtype) + i + 0.5 for _ in range(2)] if normed else [None, None]
        qkv = tokens(B, 2 * length, 3 * H * E, dtype)[:, :length]
        streams.append(Stream(qkv, H, weights[0], weights[1], 1e-6))
    ours, theirs = kernels.heads(*streams), DEFINITIONS.heads(*streams)
    assert torch.equal(ours[2], theirs[2])
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == (B, sum(lengths), H, E)
        assert a.transpose(1, 2).is_contiguous()
        ulp = 2.0**-20 if dtype == torch.float32 else 2.0**-10
        assert ((a.double() - b.double()).abs() <= b.double().abs() * ulp).all()
        if not normed:
            assert torch.equal(a, b)


def test_no_tokens_are_no_work(kernels: Kernels) -> None:
    x, v = torch.empty(2, 0, 8, device=DEVICE), torch.empty(2, 8, device=DEVICE)
    (rows,) = kernels.modulated(x, Taker(v, v, "e4m3fn"))
    assert isinstance(rows, Scaled)
    assert rows.q.shape == (0, 8)
    assert kernels.residual(x, v, x).shape == (2, 0, 8)
    assert kernels.gelu(x, "int8", None).q.shape == (0, 8)


@pytest.mark.skipif(not GPU, reason="the interpreter rounds to e4m3fn in a way of its own")
def test_the_processor_converts_as_the_definition_does() -> None:
    from octavo.fp8.kernels.quantize import quantize_rows

    x = torch.cat([torch.linspace(-500, 500, 8000), torch.linspace(-0.02, 0.02, 8000)])[None].to(DEVICE)
    one = torch.tensor(1.0, device=DEVICE)
    assert torch.equal(quantize_rows(x, one).q.float(), quantize(x, scale=one).q.float())
