"""The loop and the optimizer: resumed runs are as uninterrupted ones, and losses fall."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from octavo.train.loop import Budget, averaged_weights, rate_factor, train
from octavo.train.optimizer import Optimizer, OptimizerSettings, orthogonal

pytestmark = pytest.mark.gradients


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.hidden = nn.Linear(6, 16)
        self.out = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(torch.tanh(self.hidden(x)))
        return out


def run(folder: Path, steps: int, phase: str = "first") -> tuple[Small, list[str]]:
    model = Small()
    lines: list[str] = []

    def loss_of_step(step: int) -> Tensor:
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        return ((model(x) - x[:, :2]) ** 2).mean()

    train(
        model,
        loss_of_step,
        matrices={"hidden.weight", "out.weight"},
        settings=OptimizerSettings(),
        budget=Budget(steps=steps),
        folder=folder,
        phase=phase,
        report=lines.append,
        log_every=5,
        save_every_seconds=1e9,
    )
    return model, lines


def test_a_run_in_two_parts_ends_as_one_that_was_not_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A constant factor, for the schedule depends on the budget, which is how the test interrupts.
    monkeypatch.setattr("octavo.train.loop.rate_factor", lambda *_: 0.5)
    whole, _ = run(tmp_path / "whole", 20)
    run(tmp_path / "parts", 9)
    parts, _ = run(tmp_path / "parts", 20)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, parts.state_dict()[name]), name


def test_a_new_phase_starts_from_the_averaged_weights_of_the_one_before(tmp_path: Path) -> None:
    first, _ = run(tmp_path, 10)
    second, _ = run(tmp_path, 0 + 1, phase="second")
    before, after = first.state_dict(), second.state_dict()
    # One step at the very start of the warm-up moves a weight by about a hundredth of the rates.
    assert all(torch.allclose(before[name], after[name], atol=1e-3) for name in before)


def test_the_loss_falls_and_the_curve_is_kept(tmp_path: Path) -> None:
    _, lines = run(tmp_path, 400)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "curve.jsonl").read_text().splitlines()]
    assert len(losses) == len(lines) == 80
    assert losses[-1] < 0.1 * losses[0]
    assert set(averaged_weights(tmp_path)) == {"hidden.weight", "hidden.bias", "out.weight", "out.bias"}


def test_rates_warm_up_stay_and_decay_to_zero() -> None:
    assert rate_factor(0.0, 0) == pytest.approx(0.01)
    assert rate_factor(0.3, 1000) == 1
    assert rate_factor(0.7, 1000) == pytest.approx(0.5)
    assert rate_factor(1.0, 1000) == 0


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 24, 6), (1, 5, 20)])
def test_newton_schulz_brings_all_singular_values_near_one(shape: tuple[int, int, int]) -> None:
    """The quintic's fixed cycle lies within [0.68, 1.13]; Jordan et al. 2024. bfloat16 adds about 0.02."""
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(orthogonal(matrices))
    well_conditioned = torch.linalg.svdvals(matrices) > 0.1 * matrices.norm(dim=(1, 2))[:, None]
    assert values.max() < 1.25
    assert values[well_conditioned].min() > 0.6


def test_gradients_are_clipped_as_one_vector() -> None:
    model = Small()
    optimizer = Optimizer(dict(model.named_parameters()), set(), OptimizerSettings())
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 100.0)
    count = sum(p.numel() for p in model.parameters())
    assert optimizer.step(1.0) == pytest.approx(100 * count**0.5, rel=1e-5)
    first = torch.cat([tensor.flatten() for tensor in optimizer.first.values()])
    assert first.norm().item() == pytest.approx(0.1, rel=1e-3)  # (1 - beta1) of a gradient of norm 1


def test_gradients_that_are_not_numbers_stop_the_run(tmp_path: Path) -> None:
    model = Small()
    with pytest.raises(FloatingPointError, match="step 0"):
        train(
            model,
            lambda step: model(torch.full((1, 6), float("nan"))).sum() + step,
            matrices=set(),
            settings=OptimizerSettings(),
            budget=Budget(steps=1),
            folder=tmp_path,
            phase="first",
        )
