"""Models and jobs as the page sees them."""

import logging
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import PurePosixPath
from typing import Any

from pydantic import BaseModel

from octavo.engine.jobs import Stored
from octavo.errors import OctavoError, RequestError, did_you_mean
from octavo.server.problems import Refused
from octavo.server.state import State

logger = logging.getLogger(__name__)


class PictureView(BaseModel):
    url: str
    name: str
    settings: dict[str, Any]
    refined: list[dict[str, Any]] = []  # parts that were drawn anew since


class ProgressView(BaseModel):
    stage: str | None = None
    value: float = 0
    max: float = 0


class JobView(BaseModel):
    """A request for pictures and what has become of it."""

    id: str
    state: str  # queued, running, done, failed, cancelled, set_aside
    over: bool
    created: float  # seconds since 1970
    seconds: float | None  # that it took
    position: int | None  # how many are before it, while it waits
    settings: dict[str, Any]
    pictures: list[PictureView]
    progress: ProgressView | None
    error: str | None


class ModelView(BaseModel):
    name: str
    called: str  # in the settings of its pictures
    title: str
    about: str
    embedded: bool
    max_side: int  # pixels
    words: str | None  # that a small model knows; None for those that know all
    preset: dict[str, Any]


class Models(BaseModel):
    models: list[ModelView]
    default: str
    samplers: list[str]
    schedules: list[str]
    speeds: list[str]
    speed: str  # where nothing is said
    loras: list[str]
    methods: list[str]  # to make a picture larger for its second pass
    hires: dict[str, Any]  # settings of that pass where nothing is said
    comfy: bool  # whether ComfyUI's page is served


def list_models(state: State) -> Models:
    """Every model of the tree that can draw; those that cannot are left out, and the log says why."""
    from octavo.checkpoint.folders import MODELS
    from octavo.pipeline.hires import METHODS, Hires
    from octavo.pipeline.speed import SPEEDS
    from octavo.sampling import SAMPLERS, SCHEDULES

    default = state.shelf.components(state.settings.model)
    names = dict.fromkeys(name for category in MODELS for name in state.shelf.names(category))
    found = list[ModelView]()
    for name in names:
        try:
            found.append(_model_view(state, name))
        except OctavoError as error:
            logger.debug("The page leaves out '%s': %s", name, error)
    chosen = next((each.name for each in found if PurePosixPath(each.name).stem == default.name), None)
    if chosen is None:  # named by a path outside of the tree
        chosen = default.name
    return Models(
        models=found,
        default=chosen,
        samplers=[name for name in SAMPLERS if not name.endswith("_gpu")],
        schedules=list(SCHEDULES),
        speeds=list(SPEEDS),
        speed=state.settings.speed,
        loras=state.shelf.loras.names(),
        methods=list(METHODS),
        hires=Hires().settings,
        comfy=find_spec("comfyui_frontend_package") is not None,
    )


def _model_view(state: State, name: str) -> ModelView:
    from octavo.checkpoint.source import open_source

    components = state.shelf.components(name)
    preset = components.preset
    with open_source(components.mmdit.path) as source:
        said = {key: value for file in source.files for key, value in file.metadata.items()}
    fp8 = f", {components.mmdit.fp8_linears} of {components.mmdit.linears} linears in FP8"
    return ModelView(
        name=name,
        called=components.name,
        title=f"{components.name}{' · FP8' if components.mmdit.fp8_linears else ''}",
        about=f"{preset.name}{fp8 if components.mmdit.fp8_linears else ''}. {said.get('octavo.domain', '')}".strip(),
        embedded=components.embedded,
        max_side=components.max_side,
        words=said.get("octavo.words"),
        preset={
            "steps": preset.steps,
            "guidance_scale": preset.guidance_scale,
            "sampler": preset.sampler,
            "schedule": preset.schedule,
            "shift": preset.shift,
            "width": preset.width,
            "height": preset.height,
        },
    )


def settings_of(state: State, model: str | None, asked: Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """The model's name for the shelf, and all settings of a request, checked against the model before it is accepted.

    Raises:
        RequestError: it does not suit the model.
        ModelNotFoundError: there is no LoRA of a name, or no ControlNet.
        CheckpointError: a LoRA or a ControlNet does not suit the model.
        Refused: more pixels than this server draws, or no such model.
    """
    from octavo.checkpoint.folders import MODELS
    from octavo.pipeline.request import GenerateRequest, resolve

    name = state.settings.model
    if model is not None:
        known = [each for category in MODELS for each in state.shelf.names(category)]
        default = state.shelf.components(name)
        # A name only: the shelf would take a path as well.
        name = next((each for each in known if model in (each, PurePosixPath(each).stem)), None)
        if name is None and model != default.name:
            text = f"There is no model '{model[:100]}'.{did_you_mean(model, known)} /octavo/models lists them."
            raise Refused(text, status=404, kind="model_not_found", param="model")
        name = name or state.settings.model
    components = state.shelf.components(name)
    request = GenerateRequest.from_settings({"speed": state.settings.speed} | dict(asked))
    job = resolve(request, components.preset, model=components.name, max_side=components.max_side)
    for each in job.passes:
        components.stack(each.loras)
        if each.width * each.height > state.settings.max_pixels:
            raise RequestError(
                f"{each.width}x{each.height} is more than the {state.settings.max_pixels} pixels that this server "
                "draws; take a smaller size, or start it with --max-pixels."
            )
    components.controls(job.controls, job.width, job.height)
    return name, job.settings


def settings_of_part(
    state: State, model: str | None, asked: Mapping[str, Any], part: Mapping[str, Any]
) -> tuple[str | None, dict[str, Any]]:
    """`settings_of` for a part that is drawn anew; `part` says which, its pictures as paths.

    Raises:
        RequestError: the part is not in the picture; and what `settings_of` raises.
    """
    from octavo.pipeline.refine import Refinement, check, edges_of

    given = {name: value for name, value in part.items() if name in Refinement.__dataclass_fields__}
    refinement = Refinement(**given)
    check(part["picture"], refinement)
    name, settings = settings_of(state, model, asked)
    components = state.shelf.components(name)
    components.controls(edges_of(part["picture"], refinement), settings["width"], settings["height"])
    return name, settings


def job_view(state: State, stored: Stored) -> JobView:
    """A stored job as the page sees it."""
    settings = dict(stored.payload.get("request", {}))
    for name in ("image", "mask"):
        if settings.get(name):
            settings[name] = PurePosixPath(settings[name]).name
    if settings.get("controls"):
        settings["controls"] = [c | {"image": PurePosixPath(c["image"]).name} for c in settings["controls"]]
    pictures = [
        PictureView(
            url=f"octavo/pictures/{each['path']}",
            name=PurePosixPath(each["path"]).name,
            settings=each["settings"],
            refined=each.get("refined", []),
        )
        for each in (stored.result or {}).get("pictures", ())
    ]
    now = state.service.progress(stored.id) if stored.state == "running" else None
    error = str((stored.error or {}).get("message", "")) or None
    return JobView(
        id=stored.id,
        state=stored.state,
        over=stored.over,
        created=stored.created,
        seconds=stored.seconds,
        position=state.queue.position(stored.id) if stored.state == "queued" else None,
        settings=settings,
        pictures=pictures,
        progress=None if now is None else ProgressView(stage=now.stage, value=now.value, max=now.max),
        error=error if stored.state in ("failed", "set_aside") else None,
    )
