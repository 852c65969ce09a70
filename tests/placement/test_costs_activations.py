"""Bounds on activations against runs whose every allocation is followed."""

import pytest
import torch
from torch import Tensor, nn

from octavo.models import (
    VAE,
    ClipConfig,
    ClipTextEncoder,
    ControlNet,
    ControlNetConfig,
    MMDiT,
    MMDiTConfig,
    Modulation,
    T5Config,
    T5Encoder,
    VAEConfig,
)
from octavo.models import attention as attention_module
from octavo.models.clip import ClipText
from octavo.models.rows import decode_bytes
from octavo.models.t5 import T5Text
from octavo.placement import activations
from octavo.placement.work import Work
from tests.placement.live import peak_of

WORKS = {
    "a picture": Work(width=384, height=256, rows=2, tokens=100, steps=3),
    "one row": Work(width=384, height=256, rows=1, tokens=100, steps=3),
    "much text": Work(width=128, height=128, rows=2, tokens=400, steps=3),
    "as much text": Work(width=256, height=256, rows=2, tokens=300, steps=3),
}


@pytest.fixture(autouse=True)
def one_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention is one operation, as on a GPU: what it holds inside is the library's."""
    monkeypatch.setattr(attention_module, "FEW", 0)
    torch.manual_seed(0)


def config(dual: tuple[int, ...] = (), *, qk_norm: bool = True) -> MMDiTConfig:
    return MMDiTConfig(
        depth=3, width=128, heads=2, dual_attention=dual, qk_norm=qk_norm, context_width=64, pooled_width=32,
        pos_embed_size=64,
    )  # fmt: skip


def inputs(shape: MMDiTConfig, work: Work) -> tuple[Tensor, Tensor]:
    height, width = work.latents
    latents = torch.randn(work.rows, shape.in_channels, height, width)
    return latents, torch.randn(work.rows, work.tokens, shape.context_width)


class Rounded(nn.Linear):
    """Makes what FP8 arithmetic makes of its input: a byte a number and a scale a row."""

    def forward(self, x: Tensor) -> Tensor:
        kept = x.to(torch.float8_e4m3fn), x.new_empty(x.numel() // x.shape[-1])  # noqa: F841  # until it has multiplied
        return super().forward(x)


@pytest.mark.parametrize("fp8", [False, True], ids=["16 bits", "fp8"])
@pytest.mark.parametrize("dual", [(), (0, 1)], ids=["plain", "dual"])
@pytest.mark.parametrize("work", WORKS.values(), ids=WORKS)
def test_a_step_never_holds_more_than_the_bound_and_comes_near_it(work: Work, dual: tuple[int, ...], fp8: bool) -> None:
    shape = config(dual, qk_norm=not fp8)
    model = MMDiT(shape)
    if fp8:
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and "block" in name and "adaLN" not in name:
                model.set_submodule(name, Rounded(module.in_features, module.out_features))
    with torch.inference_mode():
        table = model.modulation(torch.rand(work.rows), torch.randn(work.rows, 32))
    latents, context = inputs(shape, work)
    peak = peak_of(lambda: model(latents, context, table))
    bound = activations.mmdit_step(shape, work, itemsize=4, fp8=fp8)
    assert 0.75 * bound < peak <= bound


def test_tables_take_the_bytes_that_are_said_and_making_them_no_more_than_the_bound() -> None:
    shape, work = config((0, 1)), Work(steps=7, prompts=2, rows=2)
    model = MMDiT(shape)
    timesteps, pooled = torch.rand(work.steps), torch.randn(work.steps, 32)
    kept = []

    def make() -> list[Modulation]:
        for _ in range(work.prompts):
            kept.append(model.modulation(timesteps, pooled))
        return kept

    peak = peak_of(make)
    assert kept[0].flat.nbytes == work.steps * activations.mmdit_table(shape, itemsize=4)
    bound = activations.modulation(shape, work, itemsize=4)
    assert 0.6 * bound < peak <= bound
    rows = [row for table in kept for row in table.each()]
    step = Modulation.stack([rows[0], rows[work.steps]])
    held = sum(table.flat.nbytes for table in kept) + step.flat.nbytes
    assert held == activations.tables(shape, work, itemsize=4)


@pytest.mark.parametrize("joint", [False, True], ids=["image alone", "joint"])
def test_a_controlnet_never_holds_more_than_the_bound(joint: bool) -> None:
    work = WORKS["a picture"]
    shape = ControlNetConfig(
        depth=3, width=128, heads=2, joint=joint, context_width=64, pooled_width=32, pos_embed_size=64
    )
    model = ControlNet(shape)
    with torch.inference_mode():
        table = model.modulation(torch.rand(work.rows), torch.randn(work.rows, 32))
    latents, _ = inputs(config(), work)
    context = torch.randn(work.rows, work.tokens, shape.context_width)
    peak = peak_of(lambda: model(latents, latents, context, table, embed=lambda x: x))
    bound = activations.controlnet_step(shape, work, itemsize=4, fp8=False)
    assert 0.6 * bound < peak <= bound


@pytest.mark.parametrize("tokens", [154, 333])
def test_encoders_never_hold_more_than_the_bound(tokens: int) -> None:
    """Two prompts, one of them with weights: an empty one stands beside it."""
    work = Work(tokens=tokens)
    t5 = T5Config(width=128, layers=2, heads=8, head_width=16, mlp_width=320, vocab_size=100)
    clip = ClipConfig(width=128, layers=2, heads=4, mlp_width=512, activation="quick_gelu", vocab_size=100)
    ids = [torch.zeros(1, length, dtype=torch.long) for length in (tokens - 77, tokens - 78, tokens - 77)]
    of_t5, of_clip = T5Encoder(t5), ClipTextEncoder(clip)
    bound = activations.encoder(t5, work, itemsize=4)
    assert 0.2 * bound < peak_of(lambda: of_t5.encode([T5Text(each) for each in ids])) <= bound
    of_text = ClipText(torch.zeros(1, 77, dtype=torch.long), end=torch.tensor([3]))
    bound = activations.encoder(clip, work, itemsize=4)
    assert 0.2 * bound < peak_of(lambda: of_clip.encode([of_text] * 3)) <= bound


@pytest.mark.parametrize("size", [(8, 8), (12, 20)], ids=str)
def test_decoding_never_holds_more_than_the_bound(size: tuple[int, int]) -> None:
    shape = VAEConfig(channels=(32, 64, 128, 128), groups=8)
    vae, z = VAE(shape), torch.randn(1, 16, *size)
    work = Work(height=8 * size[0], width=8 * size[1])
    peak = peak_of(lambda: vae.decode(z).float().clamp(-1, 1))
    bound = activations.vae_decode(shape, work, itemsize=4)
    assert 0.6 * bound < peak <= bound


def test_large_pictures_take_the_bytes_of_decoding_by_rows() -> None:
    """Three maps of 128 channels in 16 bits, half of what a whole decoding takes, and the rows that are worked on."""
    rows = decode_bytes(VAEConfig(), 1024, 1024, torch.bfloat16, torch.device("cuda"))
    assert activations.vae_decode(VAEConfig(), Work(), itemsize=2) == rows + 2 * 3 * 4 * 1024**2
    assert 3 * 128 * 2 * 1024**2 <= rows < 6 * 128 * 2 * 1024**2


def test_decoding_in_tiles_never_holds_more_than_the_bound() -> None:
    from octavo.pipeline.decode import decode

    shape = VAEConfig(channels=(32, 64, 128, 128), groups=8)
    vae, latents = VAE(shape), torch.randn(1, 16, 40, 40)
    work = Work(height=320, width=320)
    peak = peak_of(lambda: decode(vae, latents, tile=16, overlap=4))
    whole = activations.vae_decode(shape, work, itemsize=4)
    bound = activations.vae_decode(shape, work, itemsize=4, tile=16)
    assert peak <= bound < whole
