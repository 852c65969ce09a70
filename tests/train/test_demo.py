"""The embedded model's training: it resumes, it learns, and its files load again."""

import json
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from octavo.checkpoint.load import load_clip, load_mmdit, load_t5, load_vae
from octavo.models.vae import SCALE, SHIFT, to_latents
from octavo.train.autoencoder import AutoencoderRecipe, autoencoder_loss, fold_statistics, new_vae, random_scene
from octavo.train.demo import PRESETS, DemoRecipe, demo_loss, draw_batch, train_stage, train_vae
from octavo.train.drawing import draw
from octavo.train.export import export
from octavo.train.latents import Pool, pool_scenes
from octavo.train.loop import Budget, averaged_weights
from octavo.train.model import CLIP_WIDTH, POSITIONS, T5_WIDTH, DemoModel, Tokenization
from octavo.train.optimizer import Optimizer
from octavo.train.scenes import MIXES

TINY = DemoRecipe(
    depth=1,
    size=32,
    batch=4,
    pool={"plain": 8, "placed": 8, "pair": 8},
    autoencoder=AutoencoderRecipe(size=16, batch=8),
)


def silent(_line: str) -> None:
    pass


def pools() -> dict[str, Pool]:
    latents = torch.randn(8, 16, 4, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    return {"plain": Pool(pool_scenes("plain", 1, 8, 0), latents)}


@pytest.mark.parametrize("preset", list(PRESETS))
def test_a_preset_has_pictures_of_every_kind_that_a_stage_mixes(preset: str) -> None:
    for mix in MIXES.values():
        assert mix.keys() <= PRESETS[preset].pool.keys()
        assert sum(mix.values()) == pytest.approx(1)


@pytest.mark.gradients
def test_a_stage_in_two_calls_ends_as_one_that_was_not_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A constant factor, for the schedule depends on the budget, which is how the test interrupts.
    monkeypatch.setattr("octavo.train.loop.rate_factor", lambda *_: 0.5)
    for name, budgets in {"whole": (4,), "parts": (1, 4)}.items():
        folder = tmp_path / name
        train_vae(folder, budget=Budget(steps=2), recipe=TINY, report=silent)
        for steps in budgets:
            train_stage(folder, 1, budget=Budget(steps=steps), recipe=TINY, report=silent)
    whole, parts = averaged_weights(tmp_path / "whole"), averaged_weights(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.gradients
def test_the_loss_on_one_batch_falls() -> None:
    torch.manual_seed(0)
    model, tokenize = DemoModel(depth=1), Tokenization()
    batch = draw_batch(pools(), {"plain": 1.0}, random.Random(0), TINY)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = Optimizer(trained, model.matrices(), TINY.optimizer)
    losses = []
    for _ in range(12):
        loss = demo_loss(model, tokenize, batch, "cpu")
        loss.backward()
        optimizer.step(1.0)
        losses.append(loss.item())
    # Gates and the final layer begin at zero, so the first prediction is zero and its error that of the data.
    assert losses[0] == pytest.approx(((batch.noise - batch.latents) ** 2).mean().item(), rel=0.02)
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.gradients
def test_the_vae_loss_falls() -> None:
    torch.manual_seed(0)
    vae, rng, recipe = new_vae(), random.Random(0), AutoencoderRecipe()
    pixels = draw([random_scene(rng) for _ in range(4)], 32)
    matrices = {name for name, p in vae.named_parameters() if p.ndim == 4 and min(p.shape[:2]) > 3}
    optimizer = Optimizer(dict(vae.named_parameters()), matrices, recipe.optimizer)
    losses = []
    for step in range(10):
        loss = autoencoder_loss(vae, pixels, torch.Generator().manual_seed(step), recipe)
        loss.backward()
        optimizer.step(1.0)
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_folding_normalises_the_latents_and_shows_the_decoder_what_it_saw_before() -> None:
    torch.manual_seed(0)
    vae = new_vae()
    pixels = draw([random_scene(random.Random(i)) for i in range(8)], 32)
    raw = vae.encode(pixels)[:, :16]
    before = vae.decoder.conv_in(raw / SCALE + SHIFT)
    fold_statistics(vae, lambda _: pixels, noise=0.2, count=1)
    moments = vae.encode(pixels)
    latents = to_latents(moments[:, :16])
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(16), rtol=0, atol=1e-4)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(16), rtol=0, atol=1e-3)
    assert moments[:, 16:].exp().sqrt().mul(SCALE).sub(0.2).abs().max() < 1e-5
    # Outside the border the convolution sees zeros, which mean something else now: only the inside is the same.
    after = vae.decoder.conv_in(moments[:, :16])
    inside = (..., slice(1, -1), slice(1, -1))
    torch.testing.assert_close(after[inside], before[inside], rtol=1e-4, atol=1e-4)


def test_tokens_are_padded_as_sd3_pads_them() -> None:
    tokens = Tokenization()(["a red star", ""])
    assert tokens.clip_l.shape == tokens.clip_g.shape == tokens.t5.shape == (2, POSITIONS)
    assert tokens.end.tolist() == [4, 1]
    end = tokens.clip_l[0, 4]
    assert (tokens.clip_l[0, 4:] == end).all()
    assert (tokens.clip_g[0, 5:] == 0).all()
    assert (tokens.t5[0, 4:] == 0).all()
    assert (tokens.t5[0, :3] == tokens.clip_g[0, 1:4] - 1).all()  # no start token


def test_a_silent_encoder_gives_zeros() -> None:
    model = DemoModel(depth=1)
    tokens = Tokenization()(["a red star"])
    context, pooled = model.condition(tokens, torch.tensor([[1.0, 0.0, 1.0]]))
    whole, both = model.condition(tokens)
    assert context.shape == (1, 2 * POSITIONS, T5_WIDTH)
    assert (context[:, :POSITIONS, CLIP_WIDTH:] == 0).all()
    assert torch.equal(context[:, :POSITIONS, :CLIP_WIDTH], whole[:, :POSITIONS, :CLIP_WIDTH])
    assert torch.equal(context[:, POSITIONS:], whole[:, POSITIONS:])
    assert torch.equal(pooled[:, :CLIP_WIDTH], both[:, :CLIP_WIDTH])
    assert (pooled[:, CLIP_WIDTH:] == 0).all()


def test_exported_files_load_as_released_ones_do_and_give_the_same_velocity(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, vae = DemoModel(), new_vae()
    for parameter in model.parameters():  # the first weights are full of zeros, which would hide mistakes
        parameter.data = (parameter.data + 0.02 * torch.randn_like(parameter)).half().float()
    written = export(model, vae, tmp_path, settings={"steps": 12}, domain="Draws nothing yet.", known=["red"])
    assert all(path.exists() for path in written)
    assert sum(path.stat().st_size for path in written) < 15_000_000

    def velocity(mmdit: torch.nn.Module) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        latents = torch.randn(1, 16, 8, 8, generator=generator)
        context = torch.randn(1, 12, T5_WIDTH, generator=generator)
        pooled = torch.randn(1, 2 * CLIP_WIDTH, generator=generator)
        out: Tensor = mmdit(latents, context, mmdit.modulation(torch.tensor([500.0]), pooled))
        return out

    expected = velocity(model.mmdit)
    cpu, f32 = torch.device("cpu"), torch.float32
    torch.testing.assert_close(velocity(load_mmdit(written[0], device=cpu, dtype=f32)), expected, rtol=1e-3, atol=1e-3)
    in_fp8 = velocity(load_mmdit(written[1], device=cpu, dtype=f32))
    # e4m3fn keeps three bits: a weight's relative error is at most 1/16, and errors of many weights average out.
    assert 0 < (in_fp8 - expected).norm() < 0.15 * expected.norm()

    tokens = Tokenization()(["a red star on a blue background"])
    files = {path.name: path for path in written}
    hidden, pooled = load_clip(files["clip_g.safetensors"], device=cpu, dtype=f32)(tokens.clip_g, end=tokens.end)
    expected_hidden, expected_pooled = model.clip_g(tokens.clip_g, end=tokens.end)
    torch.testing.assert_close(hidden, expected_hidden, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(pooled, expected_pooled, rtol=1e-3, atol=1e-3)
    rows = load_t5(files["t5xxl.safetensors"], device=cpu, dtype=f32)(tokens.t5)
    torch.testing.assert_close(rows, model.t5xxl(tokens.t5), rtol=1e-3, atol=1e-3)
    pixels = torch.zeros(1, 3, 32, 32)
    loaded = load_vae(written[0], device=cpu, dtype=f32)
    torch.testing.assert_close(loaded.encode(pixels), vae.encode(pixels), rtol=1e-2, atol=1e-2)
    assert json.loads(files["t5xxl.tokenizer.json"].read_text())["model"]["type"] == "WordLevel"
