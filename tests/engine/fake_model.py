"""A model that costs nothing and treats every row by itself; it counts its calls, and can be made to fail."""

import threading
from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from octavo.models import Modulation
from octavo.models.packed import Packed
from octavo.pipeline.denoise import Track
from octavo.pipeline.encode import Conditioning
from octavo.pipeline.run import Run
from octavo.sampling import ClassifierFree, Guidance, get_sampler, schedule
from octavo.sampling.flow import add_noise
from octavo.sampling.noise import initial_noise

WIDTH = 4
BAD = 13.0  # a prompt of this gives NaN


class FakeModel(nn.Module):
    """What of an MMDiT the pipeline uses. Its velocity is a function of each row's own latents, prompt and level.

    Attributes:
        calls: rows of each call of the model, in order.
        memory: rows for which memory suffices; a call of more raises what torch raises.
        gate: calls wait while it is not set.
    """

    def __init__(self) -> None:
        super().__init__()
        self.x_embedder = nn.Module()
        self.x_embedder.proj = nn.Linear(1, 1)
        self.calls: list[int] = []
        self.memory: int | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.started = threading.Semaphore(0)  # released once with each call

    def modulation(self, timestep: Tensor, pooled: Tensor) -> Modulation:
        """One number a row."""
        table = (timestep / 1000 + pooled.mean(1))[:, None, None].expand(-1, 2, WIDTH)
        return Modulation.of((table,), (table,), table)

    def modulations(self, asked: Sequence[tuple[Tensor, Tensor]]) -> list[Modulation]:
        """Of several prompts."""
        return [self.modulation(timestep, pooled) for timestep, pooled in asked]

    def forward(
        self,
        latents: Tensor,
        context: Tensor | Packed,
        modulation: Modulation,
        *,
        skip_layers: Collection[int] = (),
        control: Sequence[Tensor | None] = (),
    ) -> Tensor:
        """[B, 16, h, w] → the same."""
        assert not control
        self.started.release()
        assert self.gate.wait(30)
        if self.memory is not None and len(latents) > self.memory:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {len(latents)} rows.")
        self.calls.append(len(latents))
        texts = [group.of(context.tokens) for group in context.groups()] if isinstance(context, Packed) else [context]
        means = [(text @ torch.ones(WIDTH) / WIDTH).mean(dim=1) for text in texts]
        prompt = torch.cat(means)[:, None, None, None]
        level = modulation.final[:, 0, 0][:, None, None, None]
        velocity = torch.sin(3 * latents) * 0.2 + 0.1 * prompt * latents - 0.3 * level + 0.01 * len(skip_layers)
        return torch.where(prompt == BAD, torch.nan, velocity)


def prompt(value: float, *, tokens: int = 4, width: int = WIDTH) -> Conditioning:
    """A text that means a number."""
    return Conditioning(torch.full((1, tokens, width), value), torch.full((1, width), value))


def a_run(
    model: "FakeModel | object",
    *,
    steps: int = 4,
    sampler: str = "euler",
    seed: int = 0,
    text: Conditioning | None = None,
    guidance: float = 1.0,
    size: tuple[int, int] = (4, 4),
    pictures: int = 1,
) -> Run:
    """A run of the fake model; without guidance each of its questions is one row a picture."""
    spec = get_sampler(sampler)
    sigmas = schedule("normal", steps, discard_penultimate=spec.discard_penultimate)
    noise = initial_noise((pictures, 16, *size), seed)
    negative = prompt(0.0) if guidance != 1 or spec.needs_uncond else None
    steering = Guidance(classifier_free=ClassifierFree(scale=guidance))
    return Run(
        mmdit=model,  # type: ignore[arg-type]
        track=Track.of(text or prompt(0.1 * seed), negative, steering, 3.0),
        sampler=spec,
        sigmas=sigmas,
        x=add_noise(torch.zeros_like(noise), noise, sigmas[0]),
        seed=seed,
    )


class Loaded:
    """A part that is loaded: gives its model when called, as `Run.mmdit` does."""

    def __init__(self, model: FakeModel) -> None:
        self.model = model

    def __call__(self) -> FakeModel:
        return self.model
