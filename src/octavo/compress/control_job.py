"""A 16-bit ControlNet becomes an FP8 one: `job` for nets, by the same recipes and to the same kinds of files.

What a net is calibrated on and judged by are runs of the model that it steers, which may itself be in FP8.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from PIL import Image

from octavo.checkpoint.folders import EMBEDDED, Folders
from octavo.checkpoint.quantized import OutputForm
from octavo.checkpoint.save import check_space
from octavo.checkpoint.source import Located, Source
from octavo.compress import gate
from octavo.compress.calibrate import Setup, set_up_for
from octavo.compress.control_blocks import ControlStream
from octavo.compress.control_points import control_picture, find_control_points, request_of
from octavo.compress.files import File, plan_file
from octavo.compress.gate import Verdict
from octavo.compress.progress import Report
from octavo.compress.prompts import gate_prompts
from octavo.compress.settings import QuantizeSettings
from octavo.compress.work import Work, identity_of
from octavo.compress.write import Summary, write_files
from octavo.devices import pick_device, pick_dtype
from octavo.errors import CheckpointError, GateError, ModelNotFoundError, RequestError, WrongModelError
from octavo.models import ControlNetConfig, MMDiTConfig
from octavo.pipeline.assemble import load
from octavo.pipeline.components import Arithmetic, Components
from octavo.pipeline.control import Control
from octavo.pipeline.control_request import ControlImage
from octavo.pipeline.controlnets import ControlNets
from octavo.pipeline.decode import to_uint8
from octavo.pipeline.generate import generate
from octavo.pipeline.latents import pixels_of
from octavo.quantize import Recipe


def quantize_controlnet(
    opened: Source,
    located: Located,
    places: Sequence[Path],
    settings: QuantizeSettings,
    recipes: Sequence[tuple[OutputForm, Recipe]],
    report: Report,
) -> Summary:
    """Quantize a ControlNet; see `job.quantize_checkpoint`, whose arguments are settled here.

    Args:
        opened: the net's file.
        located: the net in it.
        places: where the files go.
        settings: as they were asked for.
        recipes: by file.
        report: told of the progress.

    Raises:
        RequestError: a setting makes no sense for ControlNets, or the model that it steers is needed and not named.
        WrongModelError: the net was not made for the model.
        and what `quantize_checkpoint` raises.
    """
    started = time.monotonic()
    _refuse_for_nets(settings)
    device = pick_device(settings.device)
    keep = False if settings.low_memory else None
    stream = ControlStream(located, device, pick_dtype(settings.dtype, device), keep=keep)
    calibrated = any(recipe.needs_calibration for _, recipe in recipes)
    judged = calibrated or bool(settings.gate) or settings.min_psnr is not None
    components, lacking = _steered(stream, settings, needed=judged)
    setup = None
    if components is not None:
        setup = _setup(components, settings)
        recipes = [(form, replace(recipe, step_sigmas=setup.runs.step_sigmas)) for form, recipe in recipes]
    planned = [plan_file(stream, place, *asked) for place, asked in zip(places, recipes, strict=True)]
    identity = identity_of(opened)
    folder = settings.work or places[0].with_name(f".{places[0].name}.work")
    with Work(folder, identity, keep=settings.work is not None) as work:
        if not work.resumed:
            check_space(places[0], sum(file.output.nbytes for file in planned))
        points = None
        if calibrated:
            assert components is not None
            assert setup is not None
            told = sha256(f"{identity} {_identity_of_model(components)}".encode()).hexdigest()
            points = find_control_points(stream, components, setup, folder=folder, source=told, report=report)
        digest = None if points is None else points.digest
        files = [plan_file(stream, f.place, f.form, f.recipe, folder=folder, digest=digest) for f in planned]
        batches = []
        if points is not None and components is not None:
            own = bool(stream.config.pos_embed_size)
            batches = points.batches(components, stream.device, stream.dtype, own=own)
            for part in (components.mmdit, components.vae, *components.encoders):
                part.release()
        write_files(stream, files, batches, report)
        batches.clear()
        stream.release()
        _judge(stream, components, lacking, files, setup, settings, folder, report)
        for file in files:
            file.put_in_place()
    return Summary(
        source=opened.path,
        source_bytes=sum(entry.nbytes for entry in located.file.entries.values()),
        files=tuple(file.told(stream) for file in files),
        seconds=time.monotonic() - started,
        resumed=work.resumed,
        sensitivity=None,
        finetuned=None,
    )


def _refuse_for_nets(settings: QuantizeSettings) -> None:
    """What is made for models alone."""
    asked = {
        "--budget": settings.budget is not None,
        "--keep-16bit": settings.keep_16bit is not None,
        "--sensitivity": settings.sensitivity is not None,
        "--finetune": bool(settings.finetune),
    }
    if given := [name for name, is_given in asked.items() if is_given]:
        raise RequestError(
            f"{' and '.join(given)} {'are' if len(given) > 1 else 'is'} for models: of a ControlNet no sensitivity is "
            "measured and nothing is trained. Layers that shall stay in 16 bits can be named in a recipe of your own, "
            "see 'octavo recipes'."
        )


def _steered(stream: ControlStream, settings: QuantizeSettings, *, needed: bool) -> tuple[Components | None, str]:
    """The model that the net steers; or, where it need not be had, why it cannot."""
    net = stream.plan.located.file.path.name
    if not needed and settings.model is None:
        return None, "no pictures were asked for; --gate 8 draws some, with the model named by --model"
    try:
        components = load(
            settings.model,
            models_dir=EMBEDDED if settings.model is None else settings.models_dir,
            text_encoders=settings.text_encoders,
            vae=settings.vae,
            device=settings.device,
            dtype=settings.dtype,
            planned=False,
        )
        config = components.mmdit.config
        assert isinstance(config, MMDiTConfig)
        Control(net=_unasked, config=stream.config, name=net, hint=_unasked).check(config)
    except (ModelNotFoundError, CheckpointError) as error:
        if settings.model is None and isinstance(error, WrongModelError):
            raise RequestError(
                f"The recipe, or the gate, needs the model that '{net}' steers. Name it by --model, such as "
                "--model sd3.5_large, in FP8 if you like; or take a recipe without calibration: --recipe row."
            ) from error
        if needed:
            raise
        return None, str(error)
    return components, ""


def _unasked(*_: object) -> Any:
    raise AssertionError("only shapes are compared")


def _setup(components: Components, settings: QuantizeSettings) -> Setup:
    config = components.mmdit.config
    assert isinstance(config, MMDiTConfig)
    return set_up_for(config, components.preset, settings, embedded=components.embedded)


def _identity_of_model(components: Components) -> str:
    """Tells the steered model's files from others, by names, sizes and times of change."""
    parts = (components.mmdit, components.vae, *components.encoders)
    stats = [(os.fspath(part.path), part.path.stat()) for part in parts if part.path.is_file()]
    return repr([(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats])


def _judge(
    stream: ControlStream,
    components: Components | None,
    lacking: str,
    files: Sequence[File],
    setup: Setup | None,
    settings: QuantizeSettings,
    folder: Path,
    report: Report,
) -> None:
    """Let the model draw, following each file as it follows the 16-bit net; a GateError where one is too far off.

    Args:
        stream: the 16-bit net.
        lacking: why there are no `components`, if there are none.
    """
    bounds = [file.recipe.min_psnr if settings.min_psnr is None else settings.min_psnr for file in files]
    wanted = any(bound is not None for bound in bounds) or any(file.recipe.needs_calibration for file in files)
    count = (gate.PICTURES if wanted else 0) if settings.gate is None else settings.gate
    skipped: str | None = None
    if not count:
        skipped = "no pictures were asked for; --gate 8 draws some"
    elif settings.low_memory and settings.gate is None:
        skipped = "the whole model would be needed in memory, and --low-memory was given; --gate 8 draws all the same"
    else:
        skipped = lacking if components is None else gate.reason_to_skip(components)
    for file, bound in zip(files, bounds, strict=True):
        file.verdict = Verdict(bound=bound, skipped=skipped)
    if skipped is not None or components is None or setup is None:
        return
    total, done = count * (2 + len(files)), 0

    def drawn() -> None:
        nonlocal done
        done += 1
        report("gate", done, total)

    controls = _control_pictures(components, setup, settings, stream.config, folder, count, drawn)
    exact = _followed(components, setup, settings, stream.plan.located.file.path, controls, drawn)
    for file, bound in zip(files, bounds, strict=True):
        # As GPUs multiply, see `gate`.
        components.controlnets = ControlNets(
            Folders.standard(settings.models_dir),
            components.device,
            components.dtype,
            Arithmetic(backend=gate.ARITHMETIC if file.rounds_inputs else None),
        )
        pictures = _followed(components, setup, settings, file.result, controls, drawn)
        file.verdict = Verdict(decibels=gate.compare(exact, pictures), bound=bound)
        if not file.verdict.passed and not settings.force:
            raise GateError(
                f"The gate asks for {bound:g} dB; pictures that follow '{file.place.name}' come to "
                f"{file.verdict.mean:.2f} dB from those that follow the 16-bit ControlNet (mean of {count}), so no "
                "file is written. Calibrate with more prompts, take another recipe, or have the file by --force."
            )


def _control_pictures(
    components: Components,
    setup: Setup,
    settings: QuantizeSettings,
    config: ControlNetConfig,
    folder: Path,
    count: int,
    drawn: Callable[[], object],
) -> list[tuple[str, Path]]:
    """Prompts that nothing was calibrated on, each with a picture to follow: of the model's own drawing."""
    prompts = (
        gate_prompts(count, embedded=setup.embedded)
        if settings.prompts is None
        else [setup.prompts[i % len(setup.prompts)] for i in range(count)]
    )
    controls = []
    for number, prompt in enumerate(prompts):
        # Another picture than the one that is drawn in the end, so that the net has something to say.
        image = generate(components, request_of(setup, prompt, gate.SEED + settings.seed + count + number))[0].image
        pixels = control_picture((pixels_of(image) + 1) / 2, config)
        place = folder / f"control-{number}.png"
        Image.fromarray(to_uint8(2 * pixels - 1)[0].numpy()).save(place)
        controls.append((prompt, place))
        drawn()
    return controls


def _followed(
    components: Components,
    setup: Setup,
    settings: QuantizeSettings,
    net: Path,
    controls: Sequence[tuple[str, Path]],
    drawn: Callable[[], object],
) -> list[Image.Image]:
    """What the model draws when it follows `controls` by the net at this path."""
    pictures = []
    for number, (prompt, picture) in enumerate(controls):
        control = ControlImage(image=os.fspath(picture), model=os.fspath(net.absolute()))
        request = request_of(setup, prompt, gate.SEED + settings.seed + number, [control])
        pictures.append(generate(components, request)[0].image)
        drawn()
    return pictures
