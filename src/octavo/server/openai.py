"""OpenAI's images API, `/v1`: generations, edits, models; answers whole or as a stream of partial pictures."""

import asyncio
import base64
import io
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from PIL import Image
from starlette.datastructures import FormData, UploadFile

from octavo.engine.jobs import Stored
from octavo.errors import OctavoError
from octavo.pipeline.bounds import nearest_side
from octavo.pipeline.inpaint import Prepared, prepare
from octavo.server import jobs, pictures, problems
from octavo.server.limits import open_picture
from octavo.server.openai_fields import DENOISE, Edits, Images, check, edits_of, size_of, steps_of
from octavo.server.openai_own import check_controls, own_wishes
from octavo.server.pictures import Made
from octavo.server.problems import Refused
from octavo.server.security import jail
from octavo.server.state import State, TheState

router = APIRouter(prefix="/v1", tags=["OpenAI"])
MOST_FIELDS = 40  # of a form
LARGEST_FIELD = 128 * 1024  # bytes of a field that is no file
EDIT_FIELDS = Edits.model_json_schema(ref_template="#/components/schemas/{model}")["properties"]
EDIT_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["image", "prompt"],
                    "properties": {
                        "image": {"type": "string", "format": "binary", "description": "PNG, JPEG or WebP"},
                        "mask": {"type": "string", "format": "binary", "description": "transparent where to edit"},
                        **{name: field for name, field in EDIT_FIELDS.items() if name != "hires"},  # refused
                    },
                }
            }
        },
    }
}
USAGE = {  # pictures are not counted in tokens here
    "input_tokens": 0, "output_tokens": 0, "total_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Order:
    """A request under way, and how to answer it."""

    body: Images
    job: jobs.Accepted
    prepared: Prepared | None

    @property
    def word(self) -> str:
        """How the stream's events are called."""
        return "image_generation" if self.prepared is None else "image_edit"


@router.post("/images/generations", response_model=None)
async def generations(body: Images, request: Request, state: TheState) -> Response:
    """Draw from words."""
    check(body)
    return await _respond(await _ordered(body, request, state, None, None), request, state)


@router.post("/images/edits", response_model=None, openapi_extra=EDIT_FORM)
async def edits(request: Request, state: TheState) -> Response:
    """Draw from a picture; where a mask is given, only what it leaves transparent."""
    largest = max(LARGEST_FIELD, state.settings.max_body)  # pictures to follow are text in a form
    async with request.form(max_files=4, max_fields=MOST_FIELDS, max_part_size=largest) as form:
        body, image, mask = await _form(form, state.settings.max_upload_pixels)
    check(body)
    return await _respond(await _ordered(body, request, state, image, mask), request, state)


async def _form(form: FormData, max_pixels: int) -> tuple[Edits, Image.Image, Image.Image | None]:
    files: dict[str, list[UploadFile]] = {"image": [], "mask": []}
    fields: dict[str, str] = {}
    for key, value in form.multi_items():
        name = key.removesuffix("[]")
        if isinstance(value, UploadFile) and name in files:
            files[name].append(value)
        elif isinstance(value, str) and name in files:
            raise Refused(
                f"{name}: send the picture as a file; this server fetches nothing from elsewhere.",
                kind="no_fetching",
                param=name,
            )
        elif isinstance(value, str) and name not in fields and "[" not in name:
            fields[name] = value
        elif name.startswith(("controls[", "loras[", "hires[")):
            what = name.partition("[")[0]
            raise Refused(
                f"{what}: an edit is a form; write it as JSON, extra_body={{'{what}': json.dumps(…)}}.", param=what
            )
        else:
            raise Refused(f"{key[:60]}: this field is not known here, or comes twice.", param=key[:60])
    body = edits_of(fields)
    if len(files["image"]) != 1 or len(files["mask"]) > 1:
        raise Refused("image: send one picture, and at most one mask.", kind="invalid_value", param="image")
    opened = []
    for name, of in files.items():
        for file in of:
            data = await file.read()
            opened.append(await asyncio.to_thread(open_picture, data, max_pixels=max_pixels, field=name))
    return body, opened[0], opened[1] if len(opened) > 1 else None


async def _ordered(
    body: Images, request: Request, state: State, image: Image.Image | None, mask: Image.Image | None
) -> Order:
    """Check all, prepare the pictures, and submit."""
    model = await pictures.known_model(state, body.model)
    preset = await pictures.preset_of(state, model)
    size = size_of(body.size)
    if size is None and image is not None:
        size = suited(image.size, preset.width * preset.height)
    wishes: dict[str, Any] = {
        "prompt": body.prompt,
        "negative_prompt": body.negative_prompt,
        "width": size and size[0],
        "height": size and size[1],
        "steps": steps_of(body, preset.steps),
        "guidance_scale": body.guidance_scale,
        "speed": body.speed,
        "sampler": body.sampler,
        "schedule": body.schedule,
        "seed": body.seed,
        "batch": body.n,
    }
    # Before anything is as large as that.
    pictures.request_of(wishes, state.settings, preset)
    prepared = None
    if image is not None:
        assert isinstance(body, Edits)
        assert size is not None
        prepared = await asyncio.to_thread(_prepared, image, mask, size)
        wishes["image"] = await asyncio.to_thread(pictures.keep_upload, prepared.image, state.settings.uploads)
        wishes["denoise"] = DENOISE[body.input_fidelity or "low"] if mask is None else 1.0
        if body.denoise is not None:
            wishes["denoise"] = body.denoise
        if prepared.mask is not None:
            wishes["mask"] = await asyncio.to_thread(pictures.keep_upload, prepared.mask, state.settings.uploads)
    wishes |= await asyncio.to_thread(own_wishes, body, state, wishes.get("image"))
    asked = pictures.request_of(wishes, state.settings, preset)
    await pictures.check_loras(state, asked)
    await check_controls(state, model, asked)
    payload = pictures.payload_of(asked, model, body.form)
    previews = bool(body.stream and body.partial_images)
    said = jobs.fingerprint_of(body, wishes.get("image"), wishes.get("mask"))
    job = await jobs.submit(request, state, "generate", payload, api="openai", previews=previews, fingerprint=said)
    return Order(body, job, prepared)


def suited(size: tuple[int, int], pixels: int) -> tuple[int, int]:
    """The size nearest to a picture's that the model can draw: sides in multiples of 16, not more pixels than usual."""
    shrink = min(1.0, (pixels / (size[0] * size[1])) ** 0.5)
    width, height = (nearest_side(side * shrink) for side in size)
    return width, height


def _prepared(image: Image.Image, mask: Image.Image | None, size: tuple[int, int]) -> Prepared:
    if mask is not None and mask.size != image.size:
        raise Refused("mask: it must be as large as the picture.", kind="invalid_value", param="mask")
    if mask is not None and (mask.mode != "RGBA" or not any(mask.getchannel("A").histogram()[:128])):
        text = "mask: nothing of it is transparent; what is to be edited must be."
        raise Refused(text, kind="invalid_value", param="mask")
    return prepare(image, mask, size, invert=True)


async def _respond(order: Order, request: Request, state: State) -> Response:
    if order.body.stream:
        headers = {"X-Accel-Buffering": "no", "Cache-Control": "no-store"}
        return StreamingResponse(_events(order, request, state), media_type="text/event-stream", headers=headers)
    stored = await order.job.finish(request)
    return JSONResponse(await asyncio.to_thread(_whole, order, stored, state, str(request.base_url)))


def _whole(order: Order, stored: Stored, state: State, base: str) -> dict[str, Any]:
    body = order.body
    done = pictures.made(stored, state.settings.output_dir)
    data: list[dict[str, str]] = []
    for each in done:
        if body.response_format == "url":
            name = _put_back(order, each, state)
            data.append({"url": (state.settings.public_url or base).rstrip("/") + state.links.path(name)})
        else:
            data.append({"b64_json": _base64(_file(order, each))})
    return {
        "created": int(stored.created),
        "background": "opaque",
        "data": data,
        "output_format": body.form,
        "quality": body.shown_quality,
        "size": _size(done[0]),
        "usage": USAGE,
    }


def _file(order: Order, made: Made) -> bytes:
    """The bytes of a finished picture as they were asked for."""
    composed = order.prepared is not None and order.prepared.whole is not None
    if not composed and order.body.output_compression is None:
        return made.path.read_bytes()
    image = made.image()
    if order.prepared is not None:
        image = order.prepared.compose(image)
    return pictures.encoded(image, order.body.form, quality=order.body.output_compression)


def _put_back(order: Order, made: Made, state: State) -> str:
    """The name of the file to serve; where what was drawn goes back into a picture, that one is kept beside."""
    if order.prepared is None or order.prepared.whole is None:
        return made.name
    path = made.path.with_name(f"{made.path.stem}edited{made.path.suffix}")
    path.write_bytes(_file(order, made))
    return path.relative_to(state.settings.output_dir.resolve()).as_posix()


async def _events(order: Order, request: Request, state: State) -> AsyncIterator[str]:
    """The stream: partial pictures as they come, then the finished ones, or an error."""
    wanted, sent, share = order.body.partial_images or 0, 0, 0.0
    common = {
        "background": "opaque",
        "output_format": order.body.form,
        "quality": order.body.shown_quality,
        "size": order.body.size or "auto",
        "created_at": int(order.job.stored.created),
    }
    try:
        async for event in order.job.events(request):
            if event.type == "progress" and event.data.get("max"):
                share = event.data["value"] / event.data["max"]
            elif event.type == "preview" and event.binary and sent < wanted and share >= (sent + 1) / (wanted + 1):
                picture = await asyncio.to_thread(_converted, event.binary, order.body.form)
                kind = f"{order.word}.partial_image"
                yield _event(kind, common | {"b64_json": _base64(picture), "partial_image_index": sent})
                sent += 1
        stored = await order.job.finish()
        for made in await asyncio.to_thread(pictures.made, stored, state.settings.output_dir):
            data = await asyncio.to_thread(_file, order, made)
            more = {"b64_json": _base64(data), "size": _size(made), "usage": USAGE}
            yield _event(f"{order.word}.completed", common | more)
    except OctavoError as error:
        status, word = problems.status_of(error)
        yield _event("error", problems.body_of("/v1/", status, word, str(error)))


def _event(kind: str, data: dict[str, Any]) -> str:
    return f"event: {kind}\ndata: {json.dumps({'type': kind} | data)}\n\n"


def _converted(preview: bytes, form: str) -> bytes:
    return pictures.encoded(Image.open(io.BytesIO(preview)).convert("RGB"), form)


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _size(made: Made) -> str:
    sides = made.settings.get("hires") or made.settings
    return f"{sides['width']}x{sides['height']}"


@router.get("/images/files/{ticket}/{name:path}", response_class=FileResponse)
async def file(ticket: str, name: str, state: TheState) -> FileResponse:
    """A picture whose address was given out; it opens for an hour."""
    found = state.links.name(f"/v1/images/files/{ticket}/{name}")
    path = jail(state.settings.output_dir, found) if found else None
    if path is None or not path.is_file():
        raise Refused("There is no such picture, or its address has expired.", status=404, kind="not_found")
    return FileResponse(path)


@router.get("/models")
async def models(state: TheState) -> dict[str, Any]:
    """The models that can be named; the first is the server's own."""
    works = await state.until_started()
    names = await asyncio.to_thread(pictures.model_names, works.shelf.folders, state.settings)
    return {"object": "list", "data": [_model(name) for name in names]}


@router.get("/models/{name:path}")
async def model(name: str, state: TheState) -> dict[str, Any]:
    """One of them."""
    works = await state.until_started()
    names = await asyncio.to_thread(pictures.model_names, works.shelf.folders, state.settings)
    pictures.named(name, names)
    return _model(name)


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": STARTED, "owned_by": "octavo"}


STARTED = int(time.time())


def install(app: FastAPI) -> None:
    """Add these routes."""
    app.include_router(router)
