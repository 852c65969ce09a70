"""What the page calls, and who else likes plain JSON: models, jobs, their events, pictures to start from.

A caller sees its own jobs only: those sent with the same key.
"""

import asyncio
import base64
import json
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from octavo.engine.events import Event
from octavo.server import jobs
from octavo.server.fields import MOST_LORAS, ControlSettings, HiresSettings, LoraSettings
from octavo.server.limits import open_picture
from octavo.server.page.views import JobView, Models, job_view, list_models, settings_of, settings_of_part
from octavo.server.problems import Refused
from octavo.server.security import caller_of, jail
from octavo.server.state import State, TheState

router = APIRouter(prefix="/octavo", tags=["octavo"])

HEARTBEAT = 15.0  # seconds after which a silent stream says that it lives
PICTURES = {".png": "image/png", ".jpg": "image/jpeg", ".webp": "image/webp"}


class ControlWish(ControlSettings):
    """A picture to follow."""

    image: str = Field(max_length=1000, description="as /octavo/pictures named it")


class Wish(BaseModel):
    """What to draw; everything but the prompt is as the model likes it where nothing is said."""

    model_config = ConfigDict(extra="forbid")

    prompt: str = Field(max_length=20_000)
    negative_prompt: str = Field("", max_length=20_000)
    loras: list[LoraSettings] = Field(
        [], max_length=MOST_LORAS, description="as /octavo/models lists them; the prompt can name more"
    )
    model: str | None = Field(None, description="name of a model, as /octavo/models lists them")
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    sampler: str | None = None
    schedule: str | None = None
    shift: float | None = None
    seed: int | None = None
    batch: int = Field(1, ge=1, le=64, description="pictures; the seed counts up")
    image: str | None = Field(None, description="picture to start from, as /octavo/pictures named it")
    mask: str | None = Field(None, description="where to draw anew: white; likewise")
    mask_grow: int = Field(0, description="pixels of the picture by which the mask is made larger")
    mask_feather: int | None = Field(None, description="pixels over which its edge is softened")
    outpaint: tuple[int, int, int, int] | None = Field(None, description="pixels to add at left, top, right, bottom")
    controls: list[ControlWish] = Field([], max_length=4, description="pictures to follow")
    denoise: float = Field(1.0, description="how much of the picture is drawn anew")
    hires: HiresSettings | None = Field(None, description="draw it again, larger")
    clip_skip: int = 2
    guidance_rescale: float = 0.0
    guidance_start: float = 0.0
    guidance_end: float = 1.0
    skip_layer_guidance: dict[str, Any] | None = None
    speed: Literal["exact", "balanced", "fast"] | None = Field(
        None, description="how many evaluations of the model are forecast instead of made; the server's own if left out"
    )


class RefineWish(BaseModel):
    """A part of a picture to draw anew, at the model's full size; everything else is as in the model's preset."""

    model_config = ConfigDict(extra="forbid")

    picture: str = Field(max_length=1000, description="a finished one, or one as /octavo/pictures named it")
    region: tuple[int, int, int, int] | None = Field(None, description="x, y, width, height in its pixels; or a mask")
    mask: str | None = Field(
        None, max_length=1000, description="where to draw anew: white; as /octavo/pictures named it"
    )
    prompt: str = Field(max_length=20_000, description="what the part shows")
    negative_prompt: str = Field("", max_length=20_000)
    denoise: float = Field(0.5, gt=0, le=1, description="how much of the part is drawn anew")
    context: int = Field(32, ge=0, le=4096, description="pixels around it that the model sees and does not change")
    feather: int = Field(8, ge=0, le=1024, description="pixels over which new and old are blended")
    follow_edges: float = Field(0.0, ge=0, le=10, description="strength of a Canny ControlNet that keeps its outlines")
    loras: list[LoraSettings] = Field([], max_length=MOST_LORAS)
    model: str | None = None
    width: int | None = Field(None, description="that the part is enlarged to")
    height: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    sampler: str | None = None
    schedule: str | None = None
    shift: float | None = None
    seed: int | None = None
    speed: Literal["exact", "balanced", "fast"] | None = Field(None, description="as of /octavo/jobs")


OF_THE_PART = {"picture", "region", "mask", "denoise", "context", "feather", "follow_edges"}


class Uploaded(BaseModel):
    name: str


class Page(BaseModel):
    """Jobs, the newest first."""

    jobs: list[JobView]
    total: int


@router.get("/models")
async def models(state: TheState) -> Models:
    """The models that can draw, with the settings that suit them."""
    await state.until_started()
    return await asyncio.to_thread(list_models, state)


@router.post("/jobs", status_code=201)
async def draw(wish: Wish, request: Request, state: TheState) -> JobView:
    """Ask for pictures. The answer comes at once; /octavo/events tells how it goes."""
    await state.until_started()
    asked = wish.model_dump(exclude_none=True, exclude={"model"})
    for holder, name in [(asked, "image"), (asked, "mask"), *((each, "image") for each in asked.get("controls", ()))]:
        if name in holder:
            holder[name] = str(_picture_called(state, holder[name], name, finished=False))
    model, settings = await asyncio.to_thread(settings_of, state, wish.model, asked)
    return await _submitted(state, request, wish, {"request": settings, "model": model, "format": "png"})


@router.post("/refine", status_code=201)
async def refine(wish: RefineWish, request: Request, state: TheState) -> JobView:
    """Ask for a part of a picture to be drawn anew. The answer comes at once; the picture is a new one."""
    await state.until_started()
    asked = wish.model_dump(exclude_none=True, exclude={"model", *OF_THE_PART})
    part = wish.model_dump(exclude_none=True, include=OF_THE_PART)
    for name in ("picture", "mask"):
        if name in part:
            part[name] = str(_picture_called(state, part[name], name, finished=name == "picture"))
    model, settings = await asyncio.to_thread(settings_of_part, state, wish.model, asked, part)
    payload = {"request": settings, "model": model, "format": "png", "refine": part}
    return await _submitted(state, request, wish, payload)


def _picture_called(state: State, name: str, param: str, *, finished: bool) -> Path:
    """Where a picture lies that was sent here, or, if that will do, was drawn here."""
    for folder in (state.settings.inputs, *([state.settings.output_dir] if finished else [])):
        path = jail(folder, name)
        if path.is_file() and path.suffix.lower() in PICTURES:
            return path
    raise Refused(f"There is no picture '{name[:100]}' here; send it to /octavo/pictures.", param=param)


async def _submitted(state: State, request: Request, wish: BaseModel, payload: dict[str, Any]) -> JobView:
    """The job, in the queue."""
    caller = caller_of(request)
    stored = await asyncio.to_thread(
        state.service.submit,
        "generate",
        payload,
        client=caller.name,
        priority=caller.priority,
        deadline=jobs.deadline_of(request, state.settings.job_timeout),
        idempotency_key=jobs.idempotency_key(request),
        fingerprint=jobs.fingerprint_of(wish),
        api="octavo",
    )
    return await asyncio.to_thread(job_view, state, stored)


@router.get("/jobs")
async def list_jobs(
    request: Request,
    state: TheState,
    limit: Annotated[int, Query(ge=1, le=500)] = 60,
    offset: Annotated[int, Query(ge=0, le=10**9)] = 0,
) -> Page:
    """The caller's jobs, the newest first."""
    client = caller_of(request).name

    def look() -> Page:
        found = state.queue.jobs(kind="generate", client=client, limit=limit, offset=offset)
        total = sum(state.queue.counts("generate", client=client).values())
        return Page(jobs=[job_view(state, each) for each in found], total=total)

    return await asyncio.to_thread(look)


@router.get("/jobs/{id}")
async def one_job(id: str, request: Request, state: TheState) -> JobView:
    """One job."""
    return await asyncio.to_thread(lambda: job_view(state, _own(request, state, id)))


@router.delete("/jobs/{id}")
async def end_job(id: str, request: Request, state: TheState) -> JobView:
    """Cancel a job that waits or runs; forget one that is over. Its pictures stay in the output folder."""

    def end() -> JobView:
        stored = _own(request, state, id)
        if stored.over:
            state.queue.delete([id])
            return job_view(state, stored)
        state.service.cancel(id)
        return job_view(state, state.queue.get(id) or stored)

    return await asyncio.to_thread(end)


@router.post("/pictures", status_code=201, openapi_extra={"requestBody": {"content": {"image/*": {}}}})
async def upload(request: Request, state: TheState) -> Uploaded:
    """Send a picture to start from, as the body: PNG, JPEG or WebP."""
    data = await request.body()

    def keep() -> Uploaded:
        image = open_picture(data, max_pixels=state.settings.max_upload_pixels, field="picture")
        name = f"{uuid.uuid4().hex}.png"
        # Written anew, so that nothing but pixels comes in.
        part = state.settings.inputs / f".{name}"
        image.save(part, "PNG")
        part.replace(state.settings.inputs / name)
        return Uploaded(name=name)

    return await asyncio.to_thread(keep)


@router.get("/pictures/{name:path}", response_class=Response)
def picture(name: str, state: TheState) -> FileResponse:
    """A finished picture."""
    path = jail(state.settings.output_dir, name)
    kind = PICTURES.get(Path(name).suffix.lower())
    if kind is None or not path.is_file():
        raise Refused(f"There is no picture '{name[:100]}'.", status=404, kind="not_found")
    # Each name is given once, so its picture never changes.
    return FileResponse(path, media_type=kind, headers={"Cache-Control": "private, max-age=31536000, immutable"})


@router.get("/events", response_class=StreamingResponse, responses={200: {"content": {"text/event-stream": {}}}})
async def events(request: Request, state: TheState) -> StreamingResponse:
    """What happens, as server-sent events: `state` of the server, `job` (all of it, when it changes), `progress` and
    `preview` (a JPEG in base64)."""
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(_stream(request, state), media_type="text/event-stream", headers=headers)


async def _stream(request: Request, state: State) -> AsyncIterator[str]:
    client = caller_of(request).name
    mine = dict[str, bool]()  # by job, whether it is the caller's
    with state.events.follow() as follower:
        told = _state_of(state)
        yield _message("state", told)
        while True:
            event = await follower.next(1.0 if not state.is_ready else HEARTBEAT)
            if (now := _state_of(state)) != told:
                told = now
                yield _message("state", told)
            if event is None:
                if state.is_ready:
                    yield ": \n\n"
                continue
            if event.job not in mine:
                stored = await asyncio.to_thread(state.queue.get, event.job)
                mine[event.job] = stored is not None and stored.kind == "generate" and stored.client == client
            if mine[event.job] and (message := await _told(state, event)) is not None:
                yield message
            if event.type in ("finished", "failed", "cancelled"):
                mine.pop(event.job)


async def _told(state: State, event: Event) -> str | None:
    if event.type == "preview":
        if event.binary is None:
            return None
        image = base64.b64encode(event.binary).decode("ascii")
        return _message("preview", {"id": event.job, "image": image, "type": "image/jpeg"})
    if event.type in ("progress", "stage"):
        return _message("progress", {"id": event.job, **event.data})
    stored = await asyncio.to_thread(state.queue.get, event.job)
    if stored is None:
        return None
    return _message("job", job_view(state, stored).model_dump(mode="json"))


def _state_of(state: State) -> dict[str, Any]:
    headline = state.shelf.components(state.settings.model).headline if state.is_ready else ""
    problem = None if state.problem is None else state.places.hidden(str(state.problem))
    return {"ready": state.is_ready, "stage": state.stage, "headline": headline, "problem": problem}


def _message(type: str, data: dict[str, Any]) -> str:
    return f"event: {type}\ndata: {json.dumps(data)}\n\n"


def _own(request: Request, state: State, id: str) -> Any:
    stored = state.queue.get(id)
    if stored is None or stored.kind != "generate" or stored.client != caller_of(request).name:
        raise Refused(f"There is no job '{id[:100]}'.", status=404, kind="not_found")
    return stored
