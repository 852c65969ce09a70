"""Rescaling at the seams leaves the function as it is; equalizing evens out, and undoes the stress twin."""

import pytest
import torch
from torch import Tensor, nn

from octavo.evaluate.stress import put_outliers_in
from octavo.models import MMDiT, MMDiTConfig
from octavo.quantize import Observer
from octavo.quantize.seams import block_seams, equalize, final_seams

CONFIGS = {
    "as Large": MMDiTConfig(depth=2, width=128, heads=2, context_width=32, pooled_width=16, pos_embed_size=8),
    "as Medium": MMDiTConfig(
        depth=3, width=128, heads=2, dual_attention=(0, 1), context_width=32, pooled_width=16, pos_embed_size=8
    ),
    "as SD3 Medium": MMDiTConfig(
        depth=2, width=128, heads=2, qk_norm=False, context_width=32, pooled_width=16, pos_embed_size=8
    ),
}


def random_model(config: MMDiTConfig) -> MMDiT:
    torch.manual_seed(0)
    return MMDiT(config).double().eval()


@torch.no_grad()
def velocity(model: MMDiT) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 16, 8, 8, generator=generator).double()
    context, pooled = torch.randn(2, 5, 32, generator=generator), torch.randn(2, 16, generator=generator)
    modulation = model.modulation(torch.tensor([900.0, 300.0]).double(), pooled.double())
    return model(latents, context.double(), modulation)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_the_stress_twin_computes_the_same(config: MMDiTConfig) -> None:
    """In float64; what differs is qk-norm's eps of 1e-6 beside mean squares that grew."""
    model = random_model(config)
    before = velocity(model)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    put_outliers_in(model)
    assert torch.allclose(velocity(model), before, rtol=1e-4, atol=1e-4 * float(before.abs().amax()))
    changed = [name for name, p in model.named_parameters() if not torch.equal(p, weights[name])]
    for part in (
        "attn.qkv.weight",
        "attn.proj.weight",
        "mlp.fc1.weight",
        "mlp.fc2.weight",
        "adaLN_modulation.1.weight",
    ):
        assert any(name.endswith(f"x_block.{part}") for name in changed)
        assert part == "mlp" or any(part in name for name in changed if "joint_blocks.0.context_block" in name)
    assert "final_layer.linear.weight" in changed


def observed(model: MMDiT) -> dict[nn.Module, Tensor]:
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    with Observer(layers, {name: frozenset({"range"}) for name in layers}) as observer:
        velocity(model)
    seen = {layer: observer.statistics(name) for name, layer in layers.items()}
    return {layer: statistics.square for layer, statistics in seen.items() if statistics is not None}


def spread(squares: dict[nn.Module, Tensor], layers: list[nn.Module]) -> float:
    """Mean over layers of the standard deviation of log₂ channel sizes."""
    return sum(float(squares[layer].log2().std() / 2) for layer in layers) / len(layers)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_equalizing_computes_the_same_and_evens_out_the_twin(config: MMDiTConfig) -> None:
    model = random_model(config)
    before = velocity(model)
    put_outliers_in(model, spread=2.0)
    squares = observed(model)
    layers: list[nn.Module] = [block.x_block.mlp.fc1 for block in model.joint_blocks]
    layers += [block.x_block.attn.proj for block in model.joint_blocks]
    uneven = spread(squares, layers)
    changed: dict[nn.Module, Tensor] = {}
    for block in model.joint_blocks:
        changed |= equalize(block_seams(block), squares)
    changed |= equalize(final_seams(model.final_layer), squares)
    assert torch.allclose(velocity(model), before, rtol=1e-4, atol=1e-4 * float(before.abs().amax()))
    after = observed(model)
    assert spread(after, layers) < 0.6 * uneven
    for layer, s in changed.items():
        assert torch.allclose(after[layer], (squares[layer] * s.to(squares[layer]) ** 2).to(after[layer]), rtol=1e-3)
        assert float(s.log().mean()) == pytest.approx(0, abs=0.05)


def test_a_seam_whose_layers_were_not_seen_is_left_alone() -> None:
    model = random_model(CONFIGS["as Large"])
    before = model.joint_blocks[0].x_block.attn.proj.weight.clone()
    changed = equalize(block_seams(model.joint_blocks[0]), {})
    assert not changed
    # gates need no statistics, so proj's rows may change; its columns' proportions may not
    rows = model.joint_blocks[0].x_block.attn.proj.weight / before
    assert torch.allclose(rows, rows[:, :1].expand_as(rows))
