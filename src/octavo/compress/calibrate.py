"""From a model's files to the points that it is calibrated on: encode the prompts, let the encoders go, run."""

from dataclasses import dataclass
from pathlib import Path

import torch

from octavo.checkpoint.kinds import WORDS_KEY
from octavo.checkpoint.presets import Preset, preset_for
from octavo.checkpoint.source import Source
from octavo.compress.blocks import BlockStream
from octavo.compress.points import Points, Runs, find_points, identity_of, read_conditionings, save_conditionings
from octavo.compress.progress import Report
from octavo.compress.prompts import calibration_prompts, read_prompts
from octavo.compress.settings import QuantizeSettings
from octavo.devices import free_bytes, whole_processor
from octavo.errors import RequestError
from octavo.models import MMDiTConfig
from octavo.pipeline.assemble import load
from octavo.pipeline.components import SPARE, Components
from octavo.pipeline.encode import Conditioning, encode
from octavo.pipeline.latents import FACTOR


@dataclass(frozen=True, slots=True)
class Setup:
    """How the model's runs are made, settled before anything is loaded.

    Attributes:
        embedded: whether it is of the embedded model's kind, which knows few words.
    """

    runs: Runs
    preset: Preset
    embedded: bool
    prompts: tuple[str, ...]


def set_up(source: Source, stream: BlockStream, settings: QuantizeSettings) -> Setup:
    """The settings of the user over those that suit the model; see `set_up_for`."""
    preset = preset_for(stream.config, stream.plan.located.file)
    embedded = any(WORDS_KEY in each.metadata for each in source.files)
    return set_up_for(stream.config, preset, settings, embedded=embedded)


def set_up_for(config: MMDiTConfig, preset: Preset, settings: QuantizeSettings, *, embedded: bool) -> Setup:
    """The settings of the user over those that suit a model of this shape.

    Raises:
        RequestError: no prompts in the file; a size beyond the model; a setting out of range.
    """
    prompts = None if settings.prompts is None else read_prompts(settings.prompts)
    if prompts is None:
        prompts = calibration_prompts(settings.calibration_size, embedded=embedded)
    width, height = settings.width or preset.width, settings.height or preset.height
    most = config.pos_embed_size * config.patch_size * FACTOR
    if max(width, height) > most or min(width, height) < 16 or width % 16 or height % 16:
        raise RequestError(f"Pictures of {width}x{height} are not possible: sides are multiples of 16 up to {most}.")
    if settings.steps is not None and not 1 <= settings.steps <= 1000:
        raise RequestError(f"steps {settings.steps} is out of range: from 1 to 1000.")
    guided = settings.guidance_scale
    if guided is not None and not 0 <= guided <= 100:
        raise RequestError(f"guidance_scale {guided} is out of range: from 0 to 100.")
    runs = Runs(
        steps=settings.steps or preset.steps,
        guidance_scale=preset.guidance_scale if guided is None else guided,
        schedule=preset.schedule,
        shift=preset.shift,
        width=width,
        height=height,
        skip_layers=preset.skip_layer_guidance,
        seed=settings.seed,
    )
    return Setup(runs, preset, embedded, tuple(prompts[: settings.calibration_size]))


def find_components(path: Path, settings: QuantizeSettings) -> Components:
    """All parts of the 16-bit model.

    Raises:
        ModelNotFoundError: its text encoders or its VAE are not found.
    """
    options = {
        "models_dir": settings.models_dir,
        "text_encoders": settings.text_encoders,
        "vae": settings.vae,
        "device": settings.device,
        "dtype": settings.dtype,
        "planned": False,
    }
    components = load(path, **options)  # type: ignore[arg-type]
    free = free_bytes(components.device)
    if free is not None and sum(part.nbytes for part in components.encoders) + SPARE > free:
        components = load(path, **options, force_fp8_text_encoders=True)  # type: ignore[arg-type]
    return components


@whole_processor()
def calibrate(
    stream: BlockStream, components: Components, setup: Setup, *, folder: Path, source: str, report: Report
) -> Points:
    """The points of the model's own runs; what `folder` holds of them is not made again.

    Args:
        source: tells the model's files from others.

    Raises:
        NumericsError: the model gave NaN or infinity.
    """
    identity = identity_of(source, setup.prompts, setup.runs, stream.device, stream.dtype)
    cache = folder / "prompts.safetensors"
    told = read_conditionings(cache, identity)
    if told is None:
        told = _encode(components, setup, stream.dtype, report)
        save_conditionings(cache, told, identity)
    return find_points(
        stream,
        setup.runs,
        told,
        folder=folder,
        identity=identity,
        done=lambda count, total: report("trajectories", count, total),
    )


@torch.inference_mode()
def _encode(components: Components, setup: Setup, dtype: torch.dtype, report: Report) -> list[Conditioning]:
    """Every prompt, then the empty one that guidance leads away from; the encoders' memory is free afterwards."""
    texts, told = [*setup.prompts, ""], []
    for number, text in enumerate(texts):
        report("encode", number, len(texts))
        told.append(encode(components.text, text).to(torch.device("cpu"), dtype))
    report("encode", len(texts), len(texts))
    for part in components.encoders:
        part.release()
    return told
