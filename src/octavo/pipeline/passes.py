"""What follows from a job alone for each of its passes, before any part of the model is touched."""

from collections.abc import Callable
from typing import Any

from octavo.pipeline.request import Job, Lora
from octavo.pipeline.run import Step
from octavo.placement.work import Work
from octavo.sampling import ClassifierFree, Guidance, get_sampler, schedule


def guidance_of(job: Job) -> Guidance:
    """How a pass is guided."""
    free = ClassifierFree(
        scale=job.guidance_scale, rescale=job.guidance_rescale, start=job.guidance_start, end=job.guidance_end
    )
    return Guidance(classifier_free=free, skip_layers=job.skip_layer_guidance)


def sides_of(job: Job) -> int:
    """Prompts that a pass is told of: two with a negative one."""
    return 2 if job.guidance_scale != 1 or get_sampler(job.sampler).needs_uncond else 1


def levels_of(job: Job) -> list[float]:
    """The noise levels of a pass."""
    discard = get_sampler(job.sampler).discard_penultimate
    return schedule(job.schedule, job.steps, shift=job.shift, denoise=job.denoise, discard_penultimate=discard)


def texts_of(job: Job) -> dict[tuple[Lora, ...], list[str]]:
    """What all passes of a job say, each text once, by the LoRAs with which it is read: those are encoded together."""
    said = dict[tuple[Lora, ...], dict[str, None]]()
    for each in job.passes:
        texts = [each.prompt, each.negative_prompt][: sides_of(each)]
        said.setdefault(each.loras, {}).update(dict.fromkeys(texts))
    return {loras: list(texts) for loras, texts in said.items()}


def work_of(job: Job, *, tokens: int) -> Work:
    """What a job asks of the model: the most that any of its passes does."""
    passes = job.passes
    return Work(
        width=max(each.width for each in passes),
        height=max(each.height for each in passes),
        steps=max(each.steps for each in passes),
        rows=max(map(sides_of, passes)),
        prompts=max(map(len, texts_of(job).values())),
        tokens=tokens,
    )


def evaluations(job: Job) -> int:
    """Of all passes of a job; 0 where a sampler chooses as it goes."""
    count = 0
    for each in job.passes:
        sampler, levels = get_sampler(each.sampler), levels_of(each)
        if sampler.adaptive:
            return 0
        count += len(sampler.calls(levels, shift=each.shift)) if len(levels) > 1 else 0
    return count


class Counted:
    """Counts the steps of all passes as those of one way.

    Attributes:
        now: how far the job is.
    """

    def __init__(self, job: Job, tell: Callable[[Step], Any]) -> None:
        """Begin; `tell` is called with each step."""
        self.now = Step(0, evaluations(job))
        self._before, self._tell = self.now, tell

    def next_pass(self) -> None:
        """What was counted so far stays."""
        self._before = self.now

    def step(self, at: Step) -> None:
        """A step of the pass that is under way."""
        before = self._before
        self.now = Step(before.done + at.done, before.total, at.denoised, before.forecast + at.forecast)
        self._tell(self.now)
