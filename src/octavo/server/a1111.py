"""AUTOMATIC1111's API, `/sdapi/v1`: pictures from words and pictures, with its field names and its info string."""

import asyncio
import base64
import json
import time
from typing import Annotated, Any

from fastapi import APIRouter, Body, FastAPI, Request
from PIL import Image

from octavo._version import __version__
from octavo.engine.jobs import Stored
from octavo.pipeline.inpaint import Prepared, ResizeMode, prepare
from octavo.server import a1111_control, a1111_hires, a1111_lists, jobs, pictures
from octavo.server.a1111_fields import (
    SAMPLER_NAMES,
    SCHEDULE_LABELS,
    Drawing,
    ImageToImage,
    TextToImage,
    check_neutral,
    unknown,
    wishes_of,
)
from octavo.server.limits import from_base64, open_picture
from octavo.server.pictures import Made
from octavo.server.problems import Refused
from octavo.server.security import caller_of
from octavo.server.state import State, TheState

router = APIRouter(prefix="/sdapi/v1", tags=["AUTOMATIC1111"])
RESIZE: tuple[ResizeMode, ...] = ("stretch", "crop", "pad")


@router.post("/txt2img")
async def txt2img(body: TextToImage, request: Request, state: TheState) -> dict[str, Any]:
    """Draw from words."""
    check_neutral(body)
    return await _draw(body, request, state, None)


@router.post("/img2img")
async def img2img(body: ImageToImage, request: Request, state: TheState) -> dict[str, Any]:
    """Draw from a picture, or a masked part of one."""
    check_neutral(body)
    if not body.init_images:
        raise unknown("init_images", "init_images: there is no picture to start from.")
    bound = state.settings.max_upload_pixels
    image = await asyncio.to_thread(_opened, body.init_images[0], bound, "init_images")
    mask = await asyncio.to_thread(_opened, body.mask, bound, "mask") if body.mask else None
    return await _draw(body, request, state, (image, mask))


async def _draw(
    body: Drawing, request: Request, state: State, start: tuple[Image.Image, Image.Image | None] | None
) -> dict[str, Any]:
    """Submit, wait, and answer in A1111's shape."""
    caller = caller_of(request).name
    options = a1111_lists.options_of(state, caller) | await a1111_lists.checked(state, body.override_settings)
    model = options["model"]
    preset = await pictures.preset_of(state, model)
    wishes = await asyncio.to_thread(wishes_of, body, options)
    prepared = None
    if start is not None:
        wishes["width"], wishes["height"] = body.width or preset.width, body.height or preset.height
        # Before anything is as large as that.
        pictures.request_of(wishes, state.settings, preset)
        assert isinstance(body, ImageToImage)
        prepared = await asyncio.to_thread(_prepared, body, *start, (wishes["width"], wishes["height"]))
        wishes |= await asyncio.to_thread(_kept, prepared, state)
        wishes["denoise"] = body.denoising_strength
    if isinstance(body, TextToImage):
        wishes["hires"] = a1111_hires.hires_of(body, preset)
    size = body.width or preset.width, body.height or preset.height
    scripts = body.alwayson_scripts or {}
    wishes["controls"] = await a1111_control.controls_of(scripts, state, wishes.get("image"), size)
    asked = pictures.request_of(wishes, state.settings, preset)
    await pictures.check_loras(state, asked)
    form = "jpeg" if options["samples_format"] == "jpg" else options["samples_format"]
    payload, said = pictures.payload_of(asked, model, form), jobs.fingerprint_of(body)
    job = await jobs.submit(request, state, "generate", payload, api="a1111", fingerprint=said)
    if not body.override_settings_restore_afterwards:
        a1111_lists.set_options(state, caller, options)
    try:
        stored = await job.finish(request)
    except Refused as refusal:
        # Interrupted: A1111 answers with what is there.
        stored = await job.refreshed()
        if refusal.kind != "cancelled" or not (stored.result or {}).get("pictures"):
            raise
    return await asyncio.to_thread(_answer, body, stored, state, prepared, form)


def _opened(text: str, max_pixels: int, field: str) -> Image.Image:
    return open_picture(from_base64(text, field=field), max_pixels=max_pixels, field=field)


def _prepared(body: ImageToImage, image: Image.Image, mask: Image.Image | None, size: tuple[int, int]) -> Prepared:
    return prepare(
        image,
        mask,
        size,
        resize=RESIZE[body.resize_mode],
        invert=bool(body.inpainting_mask_invert),
        blur=4 if body.mask_blur is None else body.mask_blur,
        fill=body.inpainting_fill == 0,
        only_masked=bool(body.inpaint_full_res),
        padding=body.inpaint_full_res_padding,
    )


def _kept(prepared: Prepared, state: State) -> dict[str, Any]:
    """The pictures where the job will find them."""
    found = {"image": pictures.keep_upload(prepared.image, state.settings.uploads)}
    if prepared.mask is not None:
        found["mask"] = pictures.keep_upload(prepared.mask, state.settings.uploads)
    return found


def _answer(body: Drawing, stored: Stored, state: State, prepared: Prepared | None, form: str) -> dict[str, Any]:
    done = pictures.made(stored, state.settings.output_dir)
    images = []
    if body.send_images:
        for each in done:
            data = each.path.read_bytes()
            if prepared is not None and prepared.whole is not None:
                data = pictures.encoded(prepared.compose(each.image()), form)
            images.append(base64.b64encode(data).decode("ascii"))
    hidden = {"init_images", "mask"} if not getattr(body, "include_init_images", False) else set[str]()
    parameters = body.model_dump(mode="json") | dict.fromkeys(hidden & type(body).model_fields.keys())
    return {"images": images, "parameters": parameters, "info": json.dumps(_info(body, stored, done))}


def _info(body: Drawing, stored: Stored, done: list[Made]) -> dict[str, Any]:
    """A1111's account of what was drawn."""
    from octavo.pipeline.image import a1111_parameters

    settings = dict(done[0].settings) if done else {}
    seeds = [each.seed for each in done]
    sampler, hires = str(settings.get("sampler", "")), settings.get("hires") or {}
    return {
        "prompt": body.prompt,
        "all_prompts": [body.prompt] * len(done),
        "negative_prompt": body.negative_prompt,
        "all_negative_prompts": [body.negative_prompt] * len(done),
        "seed": seeds[0] if seeds else -1,
        "all_seeds": seeds,
        "subseed": seeds[0] if seeds else -1,
        "all_subseeds": seeds,
        "subseed_strength": 0,
        "width": settings.get("width"),
        "height": settings.get("height"),
        "sampler_name": SAMPLER_NAMES.get(sampler, sampler),
        "cfg_scale": settings.get("guidance_scale"),
        "steps": settings.get("steps"),
        "batch_size": body.batch_size,
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": settings.get("model"),
        "sd_model_hash": "",
        "sd_vae_name": None,
        "sd_vae_hash": None,
        "seed_resize_from_w": -1,
        "seed_resize_from_h": -1,
        "denoising_strength": hires.get("denoise", getattr(body, "denoising_strength", None)),
        "extra_generation_params": {
            "Schedule type": SCHEDULE_LABELS.get(str(settings.get("schedule")), settings.get("schedule")),
            **a1111_hires.told(hires),
        },
        "index_of_first_image": 0,
        "infotexts": [a1111_parameters(dict(each.settings)) for each in done],
        "styles": [],
        "job_timestamp": time.strftime("%Y%m%d%H%M%S", time.localtime(stored.created)),
        "clip_skip": settings.get("clip_skip", 2),
        "is_using_inpainting_conditioning": False,
        "version": f"Octavo {__version__}",
        "job_id": stored.id,
    }


@router.get("/progress")
async def progress(request: Request, state: TheState, skip_current_image: bool = False) -> dict[str, Any]:
    """How far the caller's oldest running request is; from the second call on with its latest preview."""
    state.glanced = time.monotonic()
    return await asyncio.to_thread(_progress, state, caller_of(request).name, skip_current_image)


def _progress(state: State, caller: str, without_image: bool) -> dict[str, Any]:
    running = [job for job in state.queue.running("generate", client=caller) if job.api == "a1111"]
    waiting = [job for job in state.queue.pending("generate", client=caller) if job.api == "a1111"]
    now = state.service.progress(running[0].id) if running else None
    share = now.value / now.max if now is not None and now.max else 0.0
    image = None
    if now is not None and now.preview is not None and now.preview.binary is not None and not without_image:
        image = base64.b64encode(now.preview.binary).decode("ascii")
    spent = time.time() - (running[0].started or time.time()) if running else 0.0
    return {
        "progress": share,
        "eta_relative": spent * (1 - share) / share if share else 0.0,
        "state": {
            "skipped": False,
            "interrupted": bool(running and running[0].cancelling),
            "stopping_generation": False,
            "job": running[0].id if running else "",
            "job_count": len(running) + len(waiting),
            "job_timestamp": time.strftime("%Y%m%d%H%M%S", time.localtime(running[0].created)) if running else "0",
            "job_no": 0,
            "sampling_step": int(now.value) if now is not None else 0,
            "sampling_steps": int(now.max) if now is not None else 0,
        },
        "current_image": image,
        "textinfo": now.stage if now is not None else None,
    }


@router.post("/interrupt")
async def interrupt(request: Request, state: TheState) -> dict[str, Any]:
    """Stop the caller's requests that are under way."""

    def stop() -> None:
        for job in state.queue.running("generate", client=caller_of(request).name):
            if job.api == "a1111":
                state.service.cancel(job.id)

    await asyncio.to_thread(stop)
    return {}


@router.post("/skip")
async def skip() -> dict[str, Any]:
    """Refused: a single picture of a request cannot be left out."""
    text = "Octavo does not skip pictures; /sdapi/v1/interrupt stops the request."
    raise Refused(text, status=422, kind="not_supported")


@router.post("/png-info")
async def png_info(
    image: Annotated[str, Body(embed=True, description="a picture in base64")], state: TheState
) -> dict[str, Any]:
    """The settings that a picture carries."""
    return await asyncio.to_thread(_png_info, image, state.settings.max_upload_pixels)


def _png_info(text: str, max_pixels: int) -> dict[str, Any]:
    from octavo.server.a1111_text import parameters_in, parsed

    data = from_base64(text, field="image")
    open_picture(data, max_pixels=max_pixels, field="image")
    info, items = parameters_in(data)
    return {"info": info, "items": items, "parameters": parsed(info)}


@router.get("/options")
async def options(request: Request, state: TheState) -> dict[str, Any]:
    """The settings that hold for the caller's later requests."""
    return a1111_lists.shown_options(state, caller_of(request).name)


@router.post("/options")
async def set_options(body: dict[str, Any], request: Request, state: TheState) -> None:
    """Change them, for this caller until the server stops."""
    found = await a1111_lists.checked(state, body)
    a1111_lists.set_options(state, caller_of(request).name, found)


def install(app: FastAPI) -> None:
    """Add these routes."""
    app.include_router(router)
    app.include_router(a1111_lists.router)
    app.include_router(a1111_control.router)
