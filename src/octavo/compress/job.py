"""A 16-bit checkpoint becomes an FP8 one: the whole job, on one page. Start reading here.

Stages run in the order written. Everything that takes long is kept in a folder beside the output until the job is done,
so that a job that was stopped, in whatever way, goes on where it was when it is started again, to the same bytes. The
output appears under its name only when it is complete and has passed its gate.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from octavo.checkpoint.folders import MODELS, Folders
from octavo.checkpoint.save import check_space
from octavo.checkpoint.source import open_source
from octavo.compress import gate
from octavo.compress.blocks import BlockStream
from octavo.compress.calibrate import Setup, calibrate, find_components, set_up
from octavo.compress.control_job import quantize_controlnet
from octavo.compress.files import File, plan_file, targets
from octavo.compress.finetune import Result, finetune_checkpoint
from octavo.compress.gate import Verdict
from octavo.compress.progress import Phase, Progress, Report
from octavo.compress.sensitivity import keep_under, measured, spare_weights
from octavo.compress.settings import QuantizeSettings
from octavo.compress.work import Work, identity_of
from octavo.compress.write import Summary, write_files
from octavo.devices import pick_device, pick_dtype
from octavo.errors import CheckpointError, GateError, ModelNotFoundError, RequestError
from octavo.pipeline.components import Components
from octavo.pipeline.controlnets import CATEGORY as CONTROLNETS


def quantize_checkpoint(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    settings: QuantizeSettings | None = None,
    *,
    watch: Callable[[Progress], object] = lambda _: None,
) -> Summary:
    """Quantize the diffusion model of a checkpoint; text encoders and VAE in the same file are copied as they are.

    A ControlNet is quantized likewise, see `control_job`.

    Args:
        source: a 16-bit model or ControlNet: a path, or a name in the models tree.
        out: the file to write, .safetensors. With form "both" the one for ComfyUI goes beside it, as `<name>-comfy`.
        settings: recipe, calibration and the rest.
        watch: called with the progress; what it raises stops the job, which can be gone on with.

    Raises:
        RequestError: a setting makes no sense, a file is there already, or the model is in FP8 already.
        RecipeError: there is no such recipe, or it says what no recipe can.
        ModelNotFoundError: the model, or an encoder that the calibration needs, is not there.
        CheckpointError: the file is damaged or of another kind, holds NaN, or the disk is full.
        GateError: the pictures of the result are too far from the original's; no file is written.
    """
    started = time.monotonic()
    settings = settings or QuantizeSettings()

    def report(phase: Phase, done: int, total: int) -> None:
        watch(Progress(phase, done, total))

    # What is asked, and whether it can be done: only headers are read
    recipes = settings.recipes()
    path = Folders.standard(settings.models_dir).find(os.fspath(source), *MODELS, CONTROLNETS)
    places = targets(path, Path(out), settings)
    device = pick_device(settings.device)
    with open_source(path) as opened:
        if (net := opened.find("controlnet")) is not None:
            return quantize_controlnet(opened, net, places, settings, recipes, report)
        if settings.model is not None:
            raise RequestError(
                f"--model {settings.model} is for ControlNets: it names the model that they steer. '{path.name}' is a "
                "model itself."
            )
        located = opened.require("mmdit")
        keep = False if settings.low_memory else None
        stream = BlockStream(located, device, pick_dtype(settings.dtype, device), keep=keep)
        setup = set_up(opened, stream, settings)
        recipes = [(form, replace(recipe, step_sigmas=setup.runs.step_sigmas)) for form, recipe in recipes]
        planned = [plan_file(stream, place, *asked) for place, asked in zip(places, recipes, strict=True)]
        for file in planned:
            spare_weights(stream, file, settings)  # refuses a budget that is too small
        calibrated = any(file.recipe.needs_calibration for file in planned) or settings.must_measure
        components, lacking = _components(path, settings, needed=calibrated)
        identity = identity_of(opened)
        folder = settings.work or places[0].with_name(f".{places[0].name}.work")
        with Work(folder, identity, keep=settings.work is not None) as work:
            if not work.resumed:
                check_space(places[0], sum(file.output.nbytes for file in planned))

            # What the model sees in its own runs, and which layers mind
            points = sensitivity = None
            if calibrated and components is not None:
                points = calibrate(stream, components, setup, folder=folder, source=identity, report=report)
            if settings.wants_sensitivity:
                sensitivity = measured(
                    stream, points, planned[0].recipe, settings, folder, partial(report, "sensitivity")
                )
                planned = [keep_under(stream, file, sensitivity, settings) for file in planned]

            # The files
            digest = None if points is None else points.digest
            files = [
                plan_file(stream, file.place, file.form, file.recipe, folder=folder, digest=digest) for file in planned
            ]
            batches = [] if points is None else points.batches(stream.device, stream.dtype)
            write_files(stream, files, batches, report)
            del batches
            stream.release()
            points = None
            finetuned = [_finetune(path, file, setup, settings, folder, report) for file in files]

            # Whether they are good enough
            _judge(components, lacking, files, setup, settings, report)
            for file in files:
                file.put_in_place()
        return Summary(
            source=path,
            source_bytes=sum(entry.nbytes for entry in located.file.entries.values()),
            files=tuple(file.told(stream) for file in files),
            seconds=time.monotonic() - started,
            resumed=work.resumed,
            sensitivity=sensitivity,
            finetuned=next((each for each in finetuned if each is not None), None),
        )


def _components(path: Path, settings: QuantizeSettings, *, needed: bool) -> tuple[Components | None, str]:
    """The parts of the 16-bit model; or, where they need not be had, why they cannot."""
    try:
        return find_components(path, settings), ""
    except (ModelNotFoundError, CheckpointError) as error:
        if needed:
            raise
        return None, str(error)


def _finetune(
    teacher: Path, file: File, setup: Setup, settings: QuantizeSettings, folder: Path, report: Report
) -> Result | None:
    """Train what is open in a file of our own form; ComfyUI's holds nothing that could be trained apart from it."""
    if not settings.finetune or file.form != "octavo":
        return None
    file.tuned = folder / f"tuned-{file.place.name}"
    return finetune_checkpoint(
        teacher,
        file.part,
        file.tuned,
        steps=settings.finetune,
        prompts=None if settings.prompts is None else setup.prompts,
        seed=settings.seed,
        width=setup.runs.width,
        height=setup.runs.height,
        sampling_steps=setup.runs.steps,
        guidance_scale=setup.runs.guidance_scale,
        text_encoders=settings.text_encoders,
        vae=settings.vae,
        models_dir=settings.models_dir,
        device=settings.device,
        dtype=settings.dtype,
        work=folder / "finetune",
        force=True,
        watch=lambda progress: report(progress.phase, progress.done, progress.total),
    )


def _judge(
    components: Components | None,
    lacking: str,
    files: Sequence[File],
    setup: Setup,
    settings: QuantizeSettings,
    report: Report,
) -> None:
    """Let each file draw beside the 16-bit model; raise a GateError where one is too far off, unless forced.

    Args:
        lacking: why there are no `components`, if there are none.
    """
    bounds = [file.recipe.min_psnr if settings.min_psnr is None else settings.min_psnr for file in files]
    wanted = any(bound is not None for bound in bounds) or any(file.recipe.needs_calibration for file in files)
    count = (gate.PICTURES if wanted else 0) if settings.gate is None else settings.gate
    skipped = None
    if not count:
        skipped = "no pictures were asked for; --gate 8 draws some"
    elif settings.low_memory and settings.gate is None:
        skipped = "the whole model would be needed in memory, and --low-memory was given; --gate 8 draws all the same"
    else:
        skipped = f"no pictures can be drawn. {lacking}" if components is None else gate.reason_to_skip(components)
    for file, bound in zip(files, bounds, strict=True):
        file.verdict = Verdict(bound=bound, skipped=skipped)
    if skipped is not None or components is None:
        return
    total = count * (1 + len(files))
    exact = gate.draw(components, setup, settings, count, lambda done: report("gate", done, total))
    for number, (file, bound) in enumerate(zip(files, bounds, strict=True), 1):
        theirs = gate.quantized_components(file.result, components, settings, rounds_inputs=file.rounds_inputs)

        def drawn(done: int, before: int = number * count) -> None:
            report("gate", before + done, total)

        pictures = gate.draw(theirs, setup, settings, count, drawn)
        file.verdict = Verdict(decibels=gate.compare(exact, pictures), bound=bound)
        if not file.verdict.passed and not settings.force:
            raise GateError(
                f"The gate asks for {bound:g} dB; pictures of '{file.place.name}' come to {file.verdict.mean:.2f} dB "
                f"from the 16-bit model's (mean of {count}), so no file is written. Calibrate with more prompts, take "
                "another recipe, keep more layers in 16 bits (--keep-16bit), or have the file all the same by --force."
            )
