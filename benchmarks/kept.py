"""What to keep of an evaluation so that the next one can be left out: five answers, at the same left-out steps.

Pictures of the embedded model by Euler in 20 steps. At fixed steps the model is not asked in full; in place of what is
missing stands what was kept of the last evaluation, or a line in sigma through the last two of it:

    first      what the blocks after the first one added (first-block cache; the first block is computed)
    whole      what all blocks added (TeaCache; only the patches are embedded)
    tokens     the image tokens that leave the last block
    velocity   the guided velocity itself
    change     the guided velocity less the latents (EasyCache)

One line of JSON each: the mean PSNR of the pictures against those of all 20 evaluations, and of fewer steps beside it.

    python -m benchmarks.kept
"""

import argparse
from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from benchmarks.common import report
from octavo import GenerateRequest, load
from octavo.evaluate.prompts import questions
from octavo.models import VAE, MMDiT
from octavo.pipeline.decode import decode
from octavo.pipeline.generate import prepare, start
from octavo.pipeline.request import resolve
from octavo.sampling import schedule
from octavo.sampling.flow import timestep
from octavo.sampling.guidance import classifier_free

Kept = Literal["first", "whole", "tokens", "velocity", "change"]
KEPT: tuple[Kept, ...] = ("first", "whole", "tokens", "velocity", "change")
STEPS, SCALE = 20, 4.0
LEFT_OUT = {"every second": range(4, 19, 2), "every third": range(5, 18, 3)}


class Pictures:
    """Prompts and noise of many pictures, walked together."""

    def __init__(self, count: int) -> None:
        components = load(device="cpu", dtype="float32")
        self.mmdit: MMDiT = components.mmdit()
        self.vae: VAE = components.vae()
        runs = []
        for seed, question in enumerate(questions(3, count)):
            request = GenerateRequest(prompt=question.prompt, seed=seed)
            job = resolve(request, components.preset, model=components.name, max_side=components.max_side)
            runs.append(start(components, job, prepare(components, job)))
        self.x = torch.cat([run.x for run in runs])
        prompts = [run.track.positive[0].conditioning for run in runs]
        negatives = [run.track.negative[0].conditioning for run in runs if run.track.negative is not None]
        self.context = torch.cat([each.context for each in (*prompts, *negatives)])
        self.pooled = torch.cat([each.pooled for each in (*prompts, *negatives)])

    def walk(
        self, steps: int, kept: Kept = "velocity", left_out: Collection[int] = (), *, line: bool = False
    ) -> Tensor:
        """Pixels [B, 3, H, W] in [0, 1]."""
        sigmas, x = schedule("simple", steps, shift=3.0), self.x
        known: list[tuple[float, Tensor]] = []
        for i, (sigma, following) in enumerate(pairwise(sigmas)):
            stand_in = _stand_in(known, sigma, line=line) if i in left_out else None
            velocity, keep = self._velocity(x, sigma, kept, stand_in)
            if stand_in is None:
                known.append((sigma, keep))
            x = x + velocity * (following - sigma)
        return ((decode(self.vae, x) + 1) / 2).clamp(0, 1)

    def _velocity(self, x: Tensor, sigma: float, kept: Kept, stand_in: Tensor | None) -> tuple[Tensor, Tensor]:
        """The guided velocity, and what of its evaluation is kept."""
        if stand_in is not None and kept == "velocity":
            return stand_in, stand_in
        if stand_in is not None and kept == "change":
            return x + stand_in, stand_in
        both = torch.cat([x, x])
        table = self.mmdit.modulation(torch.full((len(both),), timestep(sigma)), self.pooled)
        text, tokens = self.mmdit.embed(both, self.context)
        after = [tokens]
        for i, block in enumerate(self.mmdit.joint_blocks):
            if stand_in is not None and (i > 0 or kept != "first"):
                break
            text, tokens = block(text, tokens, table.context[i], table.image[i])
            after.append(tokens)
        if stand_in is not None:
            tokens = stand_in if kept == "tokens" else tokens + stand_in
        cond, uncond = self.mmdit.finish(tokens, table.final, x.shape[-2:]).chunk(2)
        velocity = classifier_free(cond, uncond, SCALE)
        if stand_in is not None:
            return velocity, stand_in
        keep = {"first": tokens - after[1], "whole": tokens - after[0], "tokens": tokens}
        return velocity, (keep | {"velocity": velocity, "change": velocity - x})[kept]


def _stand_in(known: Sequence[tuple[float, Tensor]], sigma: float, *, line: bool) -> Tensor:
    last_sigma, last = known[-1]
    if not line:
        return last
    first_sigma, first = known[-2]
    return torch.lerp(first, last, 1 + (sigma - last_sigma) / (last_sigma - first_sigma))


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=32, help="pictures")
    pictures = Pictures(parser.parse_args().count)
    exact = pictures.walk(STEPS)

    def closeness(got: Tensor) -> float:
        squared = (got - exact).square().flatten(1).mean(1).clamp_min(1e-10)
        return float((-10 * squared.log10()).mean())

    for name, left_out in LEFT_OUT.items():
        made = STEPS - len(left_out)
        report(f"kept: {made} steps instead", "dB", closeness(pictures.walk(made)), evaluations=made)
        for kept in KEPT:
            for line in (False, True):
                got = pictures.walk(STEPS, kept, left_out, line=line)
                how = "on a line through the last two" if line else "as it was"
                report(f"kept: {name} step left out, {kept} {how}", "dB", closeness(got), evaluations=made)


if __name__ == "__main__":
    main()
