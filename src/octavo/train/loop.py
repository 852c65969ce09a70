"""The training loop: time-boxed, resumable, logged. What is trained, and on what, are its arguments.

A run is a folder: `state.safetensors` (weights, optimizer, averages), `state.json` (where it stands) and
`curve.jsonl` (the learning curve, a line every few steps). Chance comes from (seed, step) alone, so a run that was
stopped and resumed gives the same weights as one that was not.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from octavo.train.optimizer import Optimizer, OptimizerSettings

LossOfStep = Callable[[int], Tensor]  # the step's number, to draw its batch by → the loss to lower
Report = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """How long to train: minutes of wall clock or steps, counted over all resumed parts of the phase."""

    minutes: float | None = None
    steps: int | None = None

    def spent(self, seconds: float, steps: int) -> float:
        """Fraction of the budget used, 1 when it is over."""
        by_time = seconds / (60 * self.minutes) if self.minutes else 0.0
        by_steps = steps / self.steps if self.steps else 0.0
        return min(1.0, max(by_time, by_steps))


@dataclass(slots=True)
class Progress:
    """Where a run stands; what `state.json` holds."""

    phase: str
    steps: int = 0  # of all phases
    phase_steps: int = 0
    phase_seconds: float = 0.0


def rate_factor(spent: float, steps: int, warm_up: int = 100, decay_from: float = 0.4) -> float:
    """Factor of the step sizes: linear warm-up, level, then linear to zero from `decay_from` of the budget on."""
    return min(1.0, (steps + 1) / warm_up) * min(1.0, max(0.0, (1 - spent) / (1 - decay_from)))


def train(
    model: nn.Module,
    loss_of_step: LossOfStep,
    *,
    matrices: Collection[str],
    settings: OptimizerSettings,
    budget: Budget,
    folder: Path,
    phase: str,
    report: Report = print,
    log_every: int = 50,
    save_every_seconds: float = 120.0,
) -> Progress:
    """Train until the budget of this phase is spent; call again with the same folder to go on.

    Args:
        model: what to train, in place; ends with its averaged weights.
        loss_of_step: draws the batch of a step and gives its loss, a scalar with gradient.
        matrices: names of the parameters that Muon updates; AdamW has the others.
        settings: of the optimizer.
        budget: of this phase.
        folder: of the run; made if missing.
        phase: name of this phase. A run in `folder` that is in the same phase is resumed; one that finished another
            phase gives its weights, and its optimizer starts afresh.
        report: gets a line of text now and then.
        log_every: steps between lines of the learning curve.
        save_every_seconds: between saves of the state.

    Returns:
        Where the run stands, the budget spent.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = Optimizer(parameters, matrices, settings)
    progress = _resume(folder, phase, model, optimizer)
    clock = time.monotonic() - progress.phase_seconds
    saved = time.monotonic()
    losses: list[Tensor] = []
    while (spent := budget.spent(progress.phase_seconds, progress.phase_steps)) < 1:
        loss = loss_of_step(progress.steps)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = optimizer.step(rate_factor(spent, progress.phase_steps))
        if not math.isfinite(norm):
            raise FloatingPointError(f"gradients are not finite at step {progress.steps}")
        losses.append(loss.detach())
        progress.steps += 1
        progress.phase_steps += 1
        progress.phase_seconds = time.monotonic() - clock
        if progress.steps % log_every == 0:
            mean = float(torch.stack(losses).mean())
            losses.clear()
            _log(folder, phase=phase, step=progress.steps, seconds=progress.phase_seconds, loss=mean, norm=norm)
            pace = progress.phase_seconds / progress.phase_steps
            report(
                f"{phase}: step {progress.steps}, loss {mean:.4f}, {pace:.3f} s a step, {100 * spent:.0f} % of the time"
            )
        if time.monotonic() - saved > save_every_seconds:
            _save(folder, progress, model, optimizer)
            saved = time.monotonic()
    _save(folder, progress, model, optimizer)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(optimizer.average[name])
    return progress


def averaged_weights(folder: Path) -> dict[str, Tensor]:
    """The averaged weights of a run, by parameter name, also while it is still training."""
    state = load_file(folder / "state.safetensors")
    return {name.removeprefix("average."): t for name, t in state.items() if name.startswith("average.")}


def _save(folder: Path, progress: Progress, model: nn.Module, optimizer: Optimizer) -> None:
    tensors = {f"weights.{name}": t.detach().contiguous() for name, t in model.state_dict().items()}
    state = {"progress": json.dumps({name: getattr(progress, name) for name in Progress.__slots__})}
    # Both in one file, put in place in one move: a run that is killed while saving keeps its last state.
    save_file(tensors | optimizer.state(), folder / "state.new", metadata=state)
    os.replace(folder / "state.new", folder / "state.safetensors")


def _resume(folder: Path, phase: str, model: nn.Module, optimizer: Optimizer) -> Progress:
    path = folder / "state.safetensors"
    if not path.exists():
        return Progress(phase)
    progress = Progress(**json.loads(read_progress(path)))
    tensors = load_file(path)
    of_model = {n.removeprefix("weights."): t for n, t in tensors.items() if n.startswith("weights.")}
    model.load_state_dict(of_model)
    if progress.phase == phase:
        optimizer.load_state(tensors)
        return progress
    # A new phase starts from the averaged weights of the one before.
    with torch.no_grad():
        for name, parameter in optimizer.parameters.items():
            parameter.copy_(tensors[f"average.{name}"])
            optimizer.average[name].copy_(parameter)
    return Progress(phase, steps=progress.steps)


def read_progress(path: Path) -> str:
    """The JSON that `state.safetensors` carries in its header."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata: Mapping[str, str] = file.metadata()
    return metadata["progress"]


def _log(folder: Path, **entry: object) -> None:
    with (folder / "curve.jsonl").open("a") as file:
        file.write(json.dumps(entry) + "\n")
