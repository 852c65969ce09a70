"""What AUTOMATIC1111's clients look up: models, samplers, options, memory."""

import asyncio
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastapi import APIRouter

from octavo.server import pictures
from octavo.server.a1111_fields import SAMPLER_NAMES, SCHEDULE_LABELS, unknown
from octavo.server.a1111_hires import LATENT_MODES, UPSCALERS
from octavo.server.settings import SPEED_NAMES
from octavo.server.state import State, TheState

router = APIRouter(prefix="/sdapi/v1", tags=["AUTOMATIC1111"])
FORMATS: Mapping[str, str] = {"png": "png", "jpg": "jpg", "jpeg": "jpg", "webp": "webp"}
MOST_CLIP_SKIP = 12
# Options that cannot be changed, as A1111 calls them: what always holds here.
FIXED: Mapping[str, Any] = {
    "samples_save": True, "enable_pnginfo": True, "jpeg_quality": 95, "return_grid": False, "grid_save": False,
    "sd_vae": "Automatic", "sd_checkpoint_hash": "", "randn_source": "CPU", "eta_noise_seed_delta": 0,
    "img2img_fix_steps": True, "img2img_color_correction": False, "inpainting_mask_weight": 1.0,
    "initial_noise_multiplier": 1.0, "live_previews_enable": True, "show_progress_every_n_steps": 1,
    "save_images_add_number": True, "sd_lora": "None", "do_not_add_watermark": True,
}  # fmt: skip


def options_of(state: State, caller: str) -> dict[str, Any]:
    """What holds for a caller: model, clip_skip, samples_format, speed."""
    usual = {"model": state.settings.model, "clip_skip": None, "samples_format": "png", "speed": state.settings.speed}
    return usual | state.a1111.get(caller, {})


def set_options(state: State, caller: str, options: Mapping[str, Any]) -> None:
    """Let these hold for a caller from now on."""
    state.a1111[caller] = options_of(state, caller) | dict(options)


def shown_options(state: State, caller: str) -> dict[str, Any]:
    """The same, as A1111 names them."""
    found = options_of(state, caller)
    model = pictures.default_name(state.settings) if found["model"] == state.settings.model else found["model"]
    return {
        **FIXED,
        "sd_model_checkpoint": model or "octavo-demo",
        "CLIP_stop_at_last_layers": found["clip_skip"] or 1,
        "samples_format": found["samples_format"],
        "octavo_speed": found["speed"],
    }


async def checked(state: State, given: Mapping[str, Any]) -> dict[str, Any]:
    """Options under A1111's names as ours.

    Raises:
        ModelNotFoundError: no such model.
        Refused: 422; an option that is not honoured, or a value that makes no sense.
    """
    found = dict[str, Any]()
    for name, value in given.items():
        if name == "sd_model_checkpoint" and isinstance(value, str):
            # A1111 shows "name [hash]".
            found["model"] = await pictures.known_model(state, value.partition(" [")[0])
        elif name == "CLIP_stop_at_last_layers" and type(value) is int and 1 <= value <= MOST_CLIP_SKIP:
            # 1 is A1111's default, and leaves SD3 models as they are there, too.
            found["clip_skip"] = None if value == 1 else value
        elif name == "samples_format" and isinstance(value, str) and value.lower() in FORMATS:
            found["samples_format"] = FORMATS[value.lower()]
        elif name == "octavo_speed" and value in SPEED_NAMES:
            found["speed"] = value
        elif not (name in FIXED and (value == FIXED[name] or (name == "sd_vae" and value in ("None", None)))):
            raise unknown(name, f"The option {name[:60]} cannot be {value!r:.60} here.")
    return found


@router.get("/sd-models")
async def sd_models(state: TheState) -> list[dict[str, Any]]:
    """Models that can be drawn with."""
    works = await state.until_started()
    names = await asyncio.to_thread(pictures.model_names, works.shelf.folders, state.settings)
    return [
        {
            "title": name,
            "model_name": Path(name).stem,
            "hash": None,
            "sha256": None,
            "filename": name,
            "config": None,
        }
        for name in names
    ]


@router.get("/samplers")
async def samplers(state: TheState) -> list[dict[str, Any]]:
    """Samplers, by A1111's names where it has them."""
    await state.until_started()
    from octavo.sampling import SAMPLERS

    return [{"name": SAMPLER_NAMES.get(name, name), "aliases": [name], "options": {}} for name in SAMPLERS]


@router.get("/schedulers")
async def schedulers(state: TheState) -> list[dict[str, Any]]:
    """Schedules, "automatic" for what suits the model."""
    await state.until_started()
    from octavo.sampling import SCHEDULES

    labels = {"automatic": "Automatic"} | {name: SCHEDULE_LABELS.get(name, name) for name in SCHEDULES}
    return [
        {"name": name, "label": label, "aliases": None, "default_rho": -1.0, "need_inner_model": False}
        for name, label in labels.items()
    ]


@router.get("/loras")
async def loras(state: TheState) -> list[dict[str, Any]]:
    """LoRA files that are there."""
    works = await state.until_started()
    names = await asyncio.to_thread(works.shelf.names, "loras")
    return [{"name": Path(name).stem, "alias": Path(name).stem, "path": name, "metadata": {}} for name in names]


@router.get("/embeddings")
async def embeddings(state: TheState) -> dict[str, Any]:
    """Textual inversions that are there."""
    works = await state.until_started()
    names = await asyncio.to_thread(works.shelf.names, "embeddings")
    unknown_yet = {"step": None, "sd_checkpoint": None, "sd_checkpoint_name": None, "shape": 0, "vectors": 0}
    return {"loaded": {Path(name).stem: unknown_yet for name in names}, "skipped": {}}


@router.get("/sd-vae")
async def sd_vae(state: TheState) -> list[dict[str, Any]]:
    """VAE files that are there; the one that suits the model is used."""
    works = await state.until_started()
    names = await asyncio.to_thread(works.shelf.names, "vae")
    return [{"model_name": Path(name).name, "filename": name} for name in names]


@router.get("/memory")
async def memory(state: TheState) -> dict[str, Any]:
    """Bytes of main memory and of the GPU."""
    await state.until_started()
    return await asyncio.to_thread(_memory)


def _memory() -> dict[str, Any]:
    import torch

    from octavo.devices import free_bytes

    free = free_bytes(torch.device("cpu")) or 0
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else free
    found: dict[str, Any] = {"ram": {"free": free, "used": total - free, "total": total}}
    if not torch.cuda.is_available():
        return found | {"cuda": {"error": "there is no CUDA device"}}
    free, total = torch.cuda.mem_get_info()
    allocated, reserved = torch.cuda.memory_stats(), torch.cuda.memory_stats()
    return found | {
        "cuda": {
            "system": {"free": free, "used": total - free, "total": total},
            "allocated": {
                "current": allocated.get("allocated_bytes.all.current", 0),
                "peak": allocated.get("allocated_bytes.all.peak", 0),
            },
            "reserved": {
                "current": reserved.get("reserved_bytes.all.current", 0),
                "peak": reserved.get("reserved_bytes.all.peak", 0),
            },
            "events": {"retries": allocated.get("num_alloc_retries", 0), "oom": allocated.get("num_ooms", 0)},
        }
    }


@router.get("/cmd-flags")
async def cmd_flags() -> dict[str, Any]:
    """A1111's command line has no counterpart here."""
    return {}


@router.get("/upscalers")
async def upscalers() -> list[dict[str, Any]]:
    """Ways to enlarge pixels that `hr_upscaler` takes; no upscaling models."""
    unknown_yet = {"model_name": None, "model_path": None, "model_url": None, "scale": 4}
    return [{"name": name} | unknown_yet for name in UPSCALERS]


@router.get("/latent-upscale-modes")
async def latent_upscale_modes() -> list[dict[str, Any]]:
    """Ways to enlarge latents that `hr_upscaler` takes."""
    return [{"name": name} for name in LATENT_MODES]


@router.get("/hypernetworks")
@router.get("/face-restorers")
@router.get("/realesrgan-models")
@router.get("/prompt-styles")
@router.get("/script-info")
async def none_of_them() -> list[dict[str, Any]]:
    """There are none of these."""
    return []


@router.get("/scripts")
async def scripts() -> dict[str, list[str]]:
    """There are no scripts: no code is loaded."""
    return {"txt2img": [], "img2img": []}


@router.post("/refresh-checkpoints")
@router.post("/refresh-loras")
@router.post("/refresh-vae")
@router.post("/refresh-embeddings")
async def refresh() -> None:
    """Nothing to do: the folders are looked at whenever they are asked for."""
