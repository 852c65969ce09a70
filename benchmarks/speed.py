"""What the speed levels save and what they cost, on the embedded model.

Over prompts that its training never showed: evaluations of the model that were forecast, rows that went through it,
seconds of denoising (levels in turns, prompt by prompt), PSNR and SSIM of the pictures against exact ones, and how many
are right by the checker and how well they fit their prompts by the judge. Beside each level the plain alternative: the
exact level with as many steps as the level made evaluations. One line of JSON each.

    python -m benchmarks.speed                                   # minutes
    python -m benchmarks.speed --count 16                        # a quick look
    python -m benchmarks.speed --tolerance 0.04 0.16             # levels that do not exist
    python -m benchmarks.speed --end 0.9 0.8                     # each level with guidance that ends earlier, too
    python -m benchmarks.speed --overhead                        # what the bookkeeping costs at 1024x1024 pixels
"""

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import interleave, report
from octavo import GenerateRequest, load
from octavo.evaluate.checker import judge as check
from octavo.evaluate.checker import load_classifier, read
from octavo.evaluate.judge import load_judge
from octavo.evaluate.metrics import psnr, ssim
from octavo.evaluate.prompts import Question, questions
from octavo.pipeline.components import Components
from octavo.pipeline.denoise import Question as Asked
from octavo.pipeline.denoise import Track
from octavo.pipeline.encode import Conditioning
from octavo.pipeline.generate import finish, prepare, start
from octavo.pipeline.request import Job, resolve
from octavo.pipeline.run import Step, solve
from octavo.pipeline.speed import EXACT, SPEEDS, Forecast, Speed
from octavo.sampling import ClassifierFree, Guidance, Guided

STAGE = 3
# As the embedded model is meant to be used, and as SD3.5 Large is: sampler, schedule, steps.
SETTINGS = (("euler", "simple", 20), ("dpmpp_2m", "sgm_uniform", 28))


class Way(NamedTuple):
    """How pictures are drawn."""

    speed: Speed
    steps: int
    end: float = 1.0  # of guidance


@dataclass(eq=False)
class Outcome:
    """What one level did."""

    seconds: list[float] = field(default_factory=list)
    made: list[int] = field(default_factory=list)  # evaluations of the model
    rows: list[int] = field(default_factory=list)  # that went through it
    pictures: list[Tensor] = field(default_factory=list)  # uint8 [3, H, W]


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    if arguments.overhead:
        _overhead()
        return
    components = load(device="cpu", dtype="float32")
    levels = [speed for speed in SPEEDS.values() if speed is not EXACT]
    if arguments.tolerance:
        levels = [
            Speed(name=f"of tolerance {tolerance:g}", tolerance=tolerance, most=arguments.most)
            for tolerance in arguments.tolerance
        ]
    asked = questions(STAGE, arguments.count)
    for sampler, schedule, steps in SETTINGS:
        conditions = {"sampler": sampler, "schedule": schedule, "steps": steps, "prompts": len(asked)}

        def job_of(question: Question, seed: int, way: Way, sampler: str = sampler, schedule: str = schedule) -> Job:
            request = GenerateRequest(
                prompt=question.prompt,
                seed=seed,
                sampler=sampler,
                schedule=schedule,
                steps=way.steps,
                guidance_end=way.end,
            )
            return resolve(request, components.preset, model=components.name, max_side=components.max_side)

        ways = {speed.name: Way(speed, steps) for speed in (EXACT, *levels)}
        for end in arguments.end:
            ways |= {f"{speed.name}, guided up to {end:g}": Way(speed, steps, end) for speed in (EXACT, *levels)}
        outcomes = _drawn(components, asked, job_of, ways)
        fewer = {round(_mean(outcomes[speed.name].made)) for speed in levels}
        plain = _drawn(components, asked, job_of, {f"exact in {n} steps": Way(EXACT, n) for n in sorted(fewer)})
        exact = outcomes["exact"]
        for name, outcome in (outcomes | plain).items():
            _report(name, outcome, exact, asked, **conditions)


@torch.inference_mode()
def _drawn(
    components: Components,
    asked: Sequence[Question],
    job_of: Callable[[Question, int, Way], Job],
    ways: Mapping[str, Way],
) -> dict[str, Outcome]:
    """Every prompt by every way, in turns."""
    outcomes = {name: Outcome() for name in ways}
    rows = 0

    def count(_module: object, args: tuple[Tensor, ...]) -> None:
        nonlocal rows
        rows += len(args[0])

    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    handle = components.mmdit().register_forward_pre_hook(count)
    for seed, question in enumerate(asked):
        for name in list(ways)[:: -1 if seed % 2 else 1]:
            job = job_of(question, seed, ways[name])
            run = replace(start(components, job, prepare(components, job)), speed=ways[name].speed)
            last: list[Step] = []
            rows, begun = 0, clock()
            latents = solve(run, last.append)
            outcome = outcomes[name]
            outcome.seconds.append(clock() - begun)
            outcome.made.append(last[-1].done - last[-1].forecast)
            outcome.rows.append(rows)
            drawn = np.asarray(finish(components, job, latents))
            outcome.pictures.append(torch.from_numpy(drawn.copy()).permute(2, 0, 1))
    handle.remove()
    return outcomes


@torch.inference_mode()
def _report(name: str, outcome: Outcome, exact: Outcome, asked: Sequence[Question], **conditions: object) -> None:
    about = f"speed, {name}"
    report(f"{about}: evaluations of the model", "a picture", _mean(outcome.made), **conditions)
    report(f"{about}: rows through the model", "a picture", _mean(outcome.rows), **conditions)
    shares = [a / b for a, b in zip(outcome.seconds, exact.seconds, strict=True)]
    report(f"{about}: time of denoising", "of exact", float(np.median(shares)), **conditions)
    classifier, judge = load_classifier(), load_judge()
    right = [check(q.scene, read(_array(p), classifier))["all"] for q, p in zip(asked, outcome.pictures, strict=True)]
    report(f"{about}: pictures that are right", "share", _mean(right), **conditions)
    fit = judge.similarity(torch.stack(outcome.pictures), [question.prompt for question in asked])
    report(f"{about}: similarity to the prompt", "100 cos", float(fit.mean()), **conditions)
    if outcome is exact:
        return
    pairs = list(zip(outcome.pictures, exact.pictures, strict=True))
    for what, measure, unit in (("PSNR", psnr, "dB"), ("SSIM", ssim, "")):
        found = sorted(measure(a, b) for a, b in pairs)
        report(f"{about}: {what} to exact, median", unit, float(np.median(found)), **conditions)
        report(f"{about}: {what} to exact, worst of twenty", unit, found[len(found) // 20], **conditions)


def _overhead() -> None:
    """What a run's forecasting costs an evaluation, beside the model: latents of 1024x1024 pixels."""
    told = Conditioning(torch.zeros(1, 4, 8), torch.zeros(1, 8))
    track = Track.of(told, told, Guidance(classifier_free=ClassifierFree()), 3.0)
    x = torch.randn(1, 16, 128, 128)

    def walk() -> None:
        forecast = Forecast(replace(SPEEDS["fast"], tolerance=1e-9), 10)
        for done in range(9):
            question = Asked(x, 1 - done / 10, track)
            if forecast.answer(question, done) is None:
                forecast.learn(question, Guided(x, x))

    seconds = interleave({"walk": walk}, warmup=3, repeats=30)["walk"]
    report("speed: bookkeeping of one evaluation at 1024x1024", "ms", 1000 * seconds.median / 9)


def _array(picture: Tensor) -> np.ndarray:
    return picture.permute(1, 2, 0).numpy()


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=128, help="prompts")
    parser.add_argument("--tolerance", type=float, nargs="+", help="of levels to try in place of those there are")
    parser.add_argument("--most", type=int, default=3, help="of these: forecasts in a row")
    parser.add_argument("--end", type=float, nargs="+", default=[], help="of guidance: each level once more with it")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--overhead", action="store_true", help="measure the bookkeeping alone")
    return parser.parse_args()


if __name__ == "__main__":
    main()
