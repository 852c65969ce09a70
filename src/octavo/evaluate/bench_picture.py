"""Whole pictures: encode, denoise, decode and all of it.

The stages are those of `pipeline.generate`, called one after the other with the device idle between them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch

from octavo.evaluate.bench_ceilings import Ceilings
from octavo.evaluate.bench_costs import Work, decode_work, encode_work, modulation_work, step_work, weight_bytes
from octavo.evaluate.bench_models import Wanted, open_model, require_room
from octavo.evaluate.bench_results import Results
from octavo.evaluate.bench_timing import NEVER, Deadline, Timing, wait_for_device
from octavo.fp8.needs import dtype_name
from octavo.models import ClipConfig, MMDiTConfig, T5Config
from octavo.models.vae import VAEConfig
from octavo.pipeline.components import Components
from octavo.pipeline.generate import finish, prepare, start
from octavo.pipeline.request import GenerateRequest, Job, resolve
from octavo.pipeline.run import solve

PROMPT = "a large red star on a blue background"
STAGES = ("encode", "denoise", "decode", "whole")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sheet:
    """What is drawn."""

    width: int  # pixels
    height: int  # pixels
    steps: int
    guidance_scale: float | None = None  # as suits the model

    def job(self, components: Components) -> Job:
        """The request for one model, without gaps."""
        request = GenerateRequest(
            prompt=PROMPT, width=self.width, height=self.height, steps=self.steps, sampler="euler", seed=1,
            guidance_scale=self.guidance_scale,
        )  # fmt: skip
        return resolve(request, components.preset, model=components.name, max_side=components.max_side)


def bench_picture(
    variants: Mapping[str, Wanted],
    sheet: Sheet,
    ceilings: Ceilings,
    results: Results,
    *,
    repeats: int = 5,
    deadline: Deadline = NEVER,
    also: Callable[[Components], Mapping[str, Callable[[], dict[str, float]]]] = lambda _components: {},
) -> dict[str, Timing]:
    """Four lines for each variant, in turns, after a first picture: `picture.large.fp8.denoise` and its like.

    Args:
        also: peers, given one of the models: by name, what draws a picture and tells seconds by stage.

    Returns:
        Timings of whole pictures.
    """
    prefix = f"picture.{next(iter(variants.values())).name}"
    models = dict[str, Components]()
    for name, wanted in variants.items():
        with results.guarded(f"{prefix}.{name}"):
            components = open_model(wanted)
            require_room([components.mmdit, *components.encoders, components.vae])
            draw(components, sheet)
            models[name] = components
    if not models:
        return {}
    drawing: dict[str, Callable[[], dict[str, float]]] = {}
    drawing |= {name: partial(draw, components, sheet) for name, components in models.items()}
    with torch.inference_mode():
        for name, peer in also(next(iter(models.values()))).items():
            with results.guarded(f"{prefix}.{name}"):
                peer()
                drawing[name] = peer
    seconds: dict[str, dict[str, list[float]]] = {name: {stage: [] for stage in STAGES} for name in drawing}
    for turn in range(repeats):
        if turn and deadline.passed:
            break
        for name in list(drawing)[:: -1 if turn % 2 else 1]:
            with torch.inference_mode():
                taken = drawing[name]()
            for stage in STAGES:
                seconds[name][stage].append(taken[stage])
    for name in drawing:
        told = {"pixels": [sheet.width, sheet.height], "steps": sheet.steps}
        if name not in models:
            for stage, taken_by in seconds[name].items():
                results.add(f"{prefix}.{name}.{stage}", Timing(tuple(taken_by)), conditions=told)
            continue
        components = models[name]
        bounds = _bounds(components, variants[name], sheet, ceilings)
        for stage, taken_by in seconds[name].items():
            results.add(
                f"{prefix}.{name}.{stage}",
                Timing(tuple(taken_by)),
                bound=bounds[stage],
                conditions={
                    **told,
                    "guidance_scale": sheet.job(components).guidance_scale,
                    "dtype": dtype_name(variants[name].dtype),
                    "fp8_linears": components.mmdit.fp8_linears,
                    **_predicted(components, stage),
                },
            )
    return {name: Timing(tuple(each["whole"])) for name, each in seconds.items()}


def draw(components: Components, sheet: Sheet) -> dict[str, float]:
    """Seconds of each stage of one picture."""
    job = sheet.job(components)
    marks = [_now()]
    track = prepare(components, job)
    marks.append(_now())
    latents = solve(start(components, job, track), lambda _step: None)
    marks.append(_now())
    finish(components, job, latents)
    marks.append(_now())
    taken = [after - before for before, after in pairwise(marks)]
    return dict(zip(STAGES, [*taken, marks[-1] - marks[0]], strict=True))


def _predicted(components: Components, stage: str) -> dict[str, float]:
    """What the memory plan expected of a stage, where there is one and the device is a card that is known."""
    plan = None if components.placing is None else components.placing.plan
    if plan is None or plan.card is None:
        return {}
    names = {"denoise": ("modulation", "denoise"), "whole": tuple(plan.stages)}.get(stage, (stage,))
    seconds = [plan.stages[name].seconds for name in names if name in plan.stages]
    return {"predicted": float(f"{sum(each for each in seconds if each is not None):.4g}")}


def _bounds(components: Components, wanted: Wanted, sheet: Sheet, ceilings: Ceilings) -> dict[str, float]:
    """The least seconds of each stage."""
    config, vae = components.mmdit.config, components.vae.config
    assert isinstance(config, MMDiTConfig)
    assert isinstance(vae, VAEConfig)
    job = sheet.job(components)
    prompts = 1 if job.guidance_scale == 1 else 2
    height, width = sheet.height // vae.factor, sheet.width // vae.factor
    tokens, text, bytes_read = 0, Work(0.0), 0.0
    counts = {"clip_l": 1, "clip_g": 1, "t5": 1}
    kits = components.text.tokenizers.encode(PROMPT)
    chunks = {"clip_l": kits.clip_l, "clip_g": kits.clip_g, "t5": kits.t5}
    for encoder in components.encoders:
        own = chunks[encoder.kind] or ()
        counts[encoder.kind] = sum(len(chunk.ids) for chunk in own)
        encoder_config = encoder.config
        assert isinstance(encoder_config, ClipConfig | T5Config)
        text += encode_work(encoder_config, counts[encoder.kind]).times(prompts)
        bytes_read += prompts * (0 if encoder.in_memory is None else weight_bytes(encoder.in_memory))
    tokens = max(counts["clip_l"], counts["clip_g"]) + counts["t5"]
    wide = dtype_name(wanted.dtype)
    linear = wide
    if wanted.fp8 and wanted.device.type == "cuda":
        linear = "e4m3fn"
    elif wanted.fast:
        linear = "int8"
    step = step_work(config, prompts, height, width, tokens).times(sheet.steps)
    step += modulation_work(config, prompts * sheet.steps)
    found = {
        # Weights are read once for each prompt; what a fast cache holds may be read faster.
        "encode": ceilings.seconds(text, linear=linear, other=wide),
        "denoise": ceilings.seconds(step, linear=linear, other=wide),
        "decode": ceilings.seconds(decode_work(vae, 1, height, width), linear=wide, other=wide),
    }
    if wanted.device.type == "cuda":
        found["encode"] = max(found["encode"], bytes_read / ceilings.copy)
    return {**found, "whole": sum(found.values())}


def _now() -> float:
    wait_for_device()
    return time.perf_counter()
