"""Texts of unlike lengths in one call of the model give what each gives alone."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from octavo.models import ControlNet, ControlNetConfig, Modulation
from octavo.models.adapter import Adapter, LayerChange, LowRank, adapted
from octavo.models.mmdit import MMDiT
from octavo.models.packed import Packed, pack
from tests.models.test_mmdit import TINY, random_model

LENGTHS = (3, 5, 5, 8)


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, list[Tensor], Tensor]:
    """Latents [4, 16, 6, 10], four texts, pooled [4, 48]."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return draw(4, 16, 6, 10), [draw(1, length, 96) for length in LENGTHS], draw(4, 48)


def apart(model: MMDiT, x: Tensor, texts: Sequence[Tensor], table: Modulation, skip: tuple[int, ...] = ()) -> Tensor:
    rows = zip(x.chunk(4), texts, table.each(), strict=True)
    return torch.cat([model(row, text, own, skip_layers=skip) for row, text, own in rows])


def test_equal_lengths_are_one_tensor_and_unlike_ones_hold_no_padding() -> None:
    _, texts, _ = inputs()
    same = pack([text[:, :3] for text in texts])
    assert isinstance(same, Tensor)
    assert torch.equal(same, torch.cat([text[:, :3] for text in texts]))
    packed = pack(texts)
    assert isinstance(packed, Packed)
    assert packed.tokens.shape == (1, sum(LENGTHS), 96)
    assert [(group.rows, group.length) for group in packed.groups()] == [
        (slice(0, 1), 3),
        (slice(1, 3), 5),
        (slice(3, 4), 8),
    ]
    assert torch.equal(torch.cat([group.of(packed.tokens) for group in packed.groups()][1:2]), torch.cat(texts[1:3]))
    for row, text in enumerate(texts):
        assert torch.equal(packed.tokens[0, packed.rows == row], text[0])
    # A row's vector reaches all of its tokens and no other.
    assert (
        packed.per_token(torch.arange(4.0)[:, None]).flatten().tolist() == [0.0] * 3 + [1.0] * 5 + [2.0] * 5 + [3.0] * 8
    )


@pytest.mark.parametrize("skip", [(), (0,)])
@pytest.mark.parametrize("dual", [(), (0,)])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_rows_of_unlike_lengths_give_what_each_gives_alone(
    qk_norm: bool, dual: tuple[int, ...], skip: tuple[int, ...]
) -> None:
    """In float64, where only the order of sums can differ: far below float32's rounding."""
    config = replace(TINY, depth=3, qk_norm=qk_norm, dual_attention=dual)
    model = random_model(config).double()
    x, texts, pooled = inputs()
    table = model.modulation(torch.tensor([1.0, 500.0, 700.0, 999.5]), pooled)
    together = model(x, pack(texts), table, skip_layers=skip)
    torch.testing.assert_close(together, apart(model, x, texts, table, skip), atol=1e-12, rtol=0)


def test_in_float32_one_call_is_as_exact_as_many() -> None:
    """Both round: neither is further from the truth, of float64, than four times the other."""
    model = random_model(replace(TINY, depth=3))
    x, texts, pooled = inputs(torch.float32)
    table = model.modulation(torch.tensor([1.0, 500.0, 700.0, 999.5]), pooled)
    found = model(x, pack(texts), table), apart(model, x, texts, table)
    wide = Modulation(table.flat.double(), table.chunks)
    truth = apart(model.double(), x.double(), [text.double() for text in texts], wide)
    errors = [(each - truth).norm().item() for each in found]
    assert 0 < errors[0] < 4 * errors[1]
    assert 0 < errors[1] < 4 * errors[0]


def test_adapters_act_on_packed_text_as_on_rows() -> None:
    model = random_model(TINY).double()
    x, texts, pooled = inputs()
    generator = torch.Generator().manual_seed(2)
    down, up = (torch.randn(shape, generator=generator, dtype=torch.float64) / 8 for shape in ((4, 128), (384, 4)))
    name = "joint_blocks.0.context_block.attn.qkv"
    lora = Adapter("lora", {name: LayerChange((LowRank(down, up),))})
    table = model.modulation(torch.full((4,), 500.0), pooled)
    plain = model(x, pack(texts), table)
    with torch.inference_mode(), adapted(model, [(lora, 0.7)]):
        together, alone = model(x, pack(texts), table), apart(model, x, texts, table)
    torch.testing.assert_close(together, alone, atol=1e-12, rtol=0)
    assert (together - plain).abs().max() > 1e-3


def test_a_controlnet_that_reads_text_takes_it_packed() -> None:
    config = ControlNetConfig(
        depth=2, width=128, heads=2, joint=True, context_width=96, pooled_width=48, pos_embed_size=12
    )
    torch.manual_seed(0)
    net = ControlNet(config)
    for parameter in net.parameters():
        parameter.copy_(torch.randn_like(parameter) / parameter[0].numel() ** 0.5)
    net = net.double()
    x, texts, pooled = inputs()
    hint, table = x.flip(-1), net.modulation(torch.full((4,), 300.0), pooled)

    def residuals(latents: Tensor, hints: Tensor, text: Tensor | Packed, own: Modulation) -> tuple[Tensor, ...]:
        given = net(latents, hints, text, own, embed=lambda latents: latents)
        assert isinstance(given, tuple)
        return given

    together = residuals(x, hint, pack(texts), table)
    rows = zip(x.chunk(4), hint.chunk(4), texts, table.each(), strict=True)
    alone = [residuals(*row) for row in rows]
    for i, residual in enumerate(together):
        torch.testing.assert_close(residual, torch.cat([each[i] for each in alone]), atol=1e-12, rtol=0)
