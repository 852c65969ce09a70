"""The gate: pictures of the quantized model beside those of the 16-bit one, same prompts, same noise.

The quantized model multiplies as GPUs do in FP8 (`plain-w8a8`) wherever its layers allow it, on any machine, so that
the arithmetic that users will get is what is judged.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
from PIL import Image

from octavo.compress.calibrate import Setup
from octavo.compress.prompts import gate_prompts
from octavo.compress.settings import QuantizeSettings
from octavo.devices import free_bytes
from octavo.pipeline.assemble import load
from octavo.pipeline.components import SPARE, Components
from octavo.pipeline.generate import generate
from octavo.pipeline.request import GenerateRequest

PICTURES = 8
ARITHMETIC = "plain-w8a8"
MOST_DECIBELS = 100.0  # of equal pictures, so that a mean stays finite
SEED = 1_000_000  # apart from the calibration's


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the gate found of one file.

    Attributes:
        decibels: of each picture, PSNR against the 16-bit model's.
        bound: that the mean has to reach, or None.
        skipped: why nothing was drawn, or None.
    """

    decibels: tuple[float, ...] = ()
    bound: float | None = None
    skipped: str | None = None

    @property
    def mean(self) -> float:
        return fmean(self.decibels)

    @property
    def passed(self) -> bool:
        """Whether nothing speaks against the file."""
        return self.skipped is not None or self.bound is None or self.mean >= self.bound

    def __str__(self) -> str:
        if self.skipped is not None:
            return f"not judged: {self.skipped}"
        bound = "" if self.bound is None else f", at least {self.bound:g} asked for"
        drawn = f"{len(self.decibels)} picture{'' if len(self.decibels) == 1 else 's'}"
        return f"{self.mean:.2f} dB from the 16-bit model over {drawn}{bound}"


def reason_to_skip(components: Components) -> str | None:
    """Why the 16-bit model cannot draw here; None if it can."""
    free = free_bytes(components.device)
    needed = components.mmdit.nbytes + SPARE
    if free is not None and needed > free:
        return f"the 16-bit model needs {needed / 1e9:.1f} GB of memory to draw, and {free / 1e9:.1f} GB are free"
    return None


def draw(
    components: Components, setup: Setup, settings: QuantizeSettings, count: int, done: Callable[[int], object]
) -> list[Image.Image]:
    """The gate's pictures by this model; its memory is free again afterwards."""
    runs, pictures = setup.runs, list[Image.Image]()
    prompts = (
        gate_prompts(count, embedded=setup.embedded)
        if settings.prompts is None
        else [setup.prompts[i % len(setup.prompts)] for i in range(count)]
    )
    for number, prompt in enumerate(prompts):
        request = GenerateRequest(
            prompt=prompt,
            width=runs.width,
            height=runs.height,
            steps=runs.steps,
            guidance_scale=runs.guidance_scale,
            sampler=setup.preset.sampler,
            schedule=runs.schedule,
            shift=runs.shift,
            seed=SEED + settings.seed + number,
            skip_layer_guidance=runs.skip_layers,
        )
        pictures.append(generate(components, request)[0].image)
        done(number + 1)
    for part in (components.mmdit, components.vae, *components.encoders):
        part.release()
    return pictures


def quantized_components(path: Path, of: Components, settings: QuantizeSettings, *, rounds_inputs: bool) -> Components:
    """The quantized file at `path` with the encoders and the VAE of the 16-bit model `of`.

    Args:
        rounds_inputs: whether the file has layers whose inputs may be rounded.
    """
    return load(
        path,
        models_dir=settings.models_dir,
        text_encoders=[part.path for part in of.encoders],
        vae=of.vae.path,
        device=settings.device,
        dtype=settings.dtype,
        backend=ARITHMETIC if rounds_inputs else None,
    )


def compare(exact: Sequence[Image.Image], quantized: Sequence[Image.Image]) -> tuple[float, ...]:
    """Peak signal-to-noise ratio of each pair, in dB, at most `MOST_DECIBELS`."""
    decibels = []
    for a, b in zip(exact, quantized, strict=True):
        error = float(np.mean((np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)) ** 2))
        decibels.append(min(MOST_DECIBELS, 10 * float(np.log10(255**2 / error))) if error else MOST_DECIBELS)
    return tuple(decibels)
