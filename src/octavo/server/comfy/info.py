"""Routes that tell what there is: nodes, models, the machine, and what ComfyUI has and we have nothing of.

The categories of models are ComfyUI's; those that we read nothing of are there and empty, as in a fresh ComfyUI.
"""

import platform
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse

from octavo.checkpoint.folders import CATEGORIES, ModelFile
from octavo.checkpoint.header import read_header
from octavo.errors import CheckpointError
from octavo.server.comfy.frontend import PACKAGE, extension_scripts
from octavo.server.comfy.lists import lists_of
from octavo.server.state import State, TheState

if TYPE_CHECKING:
    import torch

    from octavo.checkpoint.folders import Folders

router = APIRouter(tags=["ComfyUI: what there is"])

LIKE = "0.12.1"  # the ComfyUI whose answers these are
OTHERS = (
    "clip_vision", "style_models", "vae_approx", "gligen", "upscale_models", "latent_upscale_models", "hypernetworks",
    "photomaker", "classifiers", "model_patches", "audio_encoders",
)  # fmt: skip


@router.get("/object_info")
async def object_info(state: TheState) -> JSONResponse:
    """Every node: its inputs with their types, defaults and ranges, and its outputs."""
    works = await state.until_started()

    def all_nodes() -> JSONResponse:
        lists = lists_of(state)
        return JSONResponse({name: spec.object_info(lists) for name, spec in works.nodes.items() if spec.listed})

    return await run_in_threadpool(all_nodes)


@router.get("/object_info/{node}")
async def object_info_of(node: str, state: TheState) -> JSONResponse:
    """One node; an empty object where there is none of that name."""
    spec = (await state.until_started()).nodes.get(node)
    if spec is None:
        return JSONResponse({})
    return JSONResponse({node: await run_in_threadpool(spec.object_info, lists_of(state))})


@router.get("/features")
def features(request: Request) -> JSONResponse:
    """What this server knows of ComfyUI's newer ways."""
    return JSONResponse(request.app.state.comfy.clients.features)


@router.get("/system_stats")
async def system_stats(state: TheState) -> JSONResponse:
    """The machine and its memory."""
    works = await state.until_started()
    return JSONResponse(await run_in_threadpool(_stats, works.shelf.device))


@router.get("/models")
def model_folders() -> list[str]:
    """The categories of model files."""
    return [*CATEGORIES, *OTHERS]


@router.get("/models/{folder}")
async def models_in(folder: str, state: TheState) -> Response:
    """The names of the files in a category."""
    if folder in OTHERS:
        return JSONResponse([])
    files = await _files(state, folder)
    return Response(status_code=404) if files is None else JSONResponse([file.name for file in files])


@router.get("/experiment/models")
async def model_places(state: TheState) -> JSONResponse:
    """The categories, and the folders of each."""
    places = _places((await state.until_started()).shelf.folders)
    return JSONResponse([{"name": name, "folders": folders} for name, folders in places.items()])


@router.get("/experiment/models/{folder}")
async def models_with_sizes(folder: str, state: TheState) -> Response:
    """The files in a category, with sizes and times."""
    if folder in OTHERS:
        return JSONResponse([])
    files = await _files(state, folder)
    if files is None:
        return Response(status_code=404)
    places = [place.absolute() for place in state.shelf.folders.places[folder]]
    return JSONResponse([_with_size(file, places) for file in files])


@router.get("/view_metadata/{folder}")
async def view_metadata(folder: str, state: TheState, filename: str = "") -> Response:
    """What a model file says of itself in its header's `__metadata__`; 404 where it says nothing."""
    file = next((each for each in await _files(state, folder) or () if each.name == filename), None)
    if file is None or file.path.suffix != ".safetensors":
        return Response(status_code=404)
    try:
        metadata = (await run_in_threadpool(read_header, file.path)).metadata
    except CheckpointError:
        metadata = {}
    return JSONResponse(dict(metadata)) if metadata else Response(status_code=404)


@router.get("/embeddings")
async def embeddings(state: TheState) -> JSONResponse:
    """Names of textual-inversion files, as prompts name them."""
    return JSONResponse([file.name.rpartition(".")[0] for file in await _files(state, "embeddings") or ()])


@router.get("/extensions")
def extensions() -> list[str]:
    """The scripts that belong to the page. There are no others: nothing that is sent here becomes code."""
    return extension_scripts()


@router.get("/i18n")
def translations() -> dict[str, Any]:
    """Translations that plug-ins bring: none."""
    return {}


@router.get("/workflow_templates")
def plugin_templates() -> dict[str, list[str]]:
    """Workflows that plug-ins bring: none. Ours are at `/templates/index.json`."""
    return {}


@router.get("/global_subgraphs")
def subgraphs() -> dict[str, Any]:
    """Subgraphs that plug-ins bring: none."""
    return {}


@router.get("/node_replacements")
def replacements() -> dict[str, Any]:
    """Nodes that took the place of others: none."""
    return {}


@router.get("/internal/folder_paths")
async def folder_paths(state: TheState) -> JSONResponse:
    """The folders of each category of models; where on the disk they are is not told."""
    return JSONResponse(_places((await state.until_started()).shelf.folders))


async def _files(state: State, folder: str) -> list[ModelFile] | None:
    """The files of a category; None where there is no such category."""
    if folder not in CATEGORIES:
        return None
    works = await state.until_started()
    return await run_in_threadpool(works.shelf.folders.files, folder)


def _places(folders: "Folders") -> dict[str, list[str]]:
    known = {
        name: list(dict.fromkeys(f"{place.parent.name}/{place.name}" for place in places))
        for name, places in folders.places.items()
    }
    return known | {name: [f"models/{name}"] for name in OTHERS}


def _with_size(file: ModelFile, places: list[Path]) -> dict[str, Any]:
    about = file.path.stat()
    return {
        "name": file.name,
        "pathIndex": next((i for i, place in enumerate(places) if file.path.absolute().is_relative_to(place)), 0),
        "modified": about.st_mtime,
        "created": about.st_ctime,
        "size": about.st_size if file.path.is_file() else sum(each.stat().st_size for each in _inside(file.path)),
    }


def _inside(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


def _stats(device: "torch.device") -> dict[str, Any]:
    """ComfyUI's words for the machine. No arguments of ours are told: there may be keys among them."""
    import torch

    from octavo.devices import device_name, free_bytes

    ram_free = free_bytes(torch.device("cpu")) or 0
    ram_total = _ram_total() or ram_free
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device)
        held = {"vram_total": total, "vram_free": free_bytes(device) or free}
        held |= {"torch_vram_total": reserved, "torch_vram_free": reserved - torch.cuda.memory_allocated(device)}
    else:
        held = {"vram_total": ram_total, "vram_free": ram_free}
        held |= {"torch_vram_total": ram_total, "torch_vram_free": ram_free}
    name = "cpu" if device.type == "cpu" else f"{device} {device_name(device)}"
    return {
        "system": {
            "os": {"win32": "nt"}.get(sys.platform, sys.platform),
            "ram_total": ram_total,
            "ram_free": ram_free,
            "comfyui_version": LIKE,
            "required_frontend_version": _version(PACKAGE),
            "installed_templates_version": "0.0.0",
            "required_templates_version": "0.0.0",
            "python_version": f"{platform.python_version()} ({platform.python_implementation()})",
            "pytorch_version": torch.__version__,
            "embedded_python": False,
            "argv": ["octavo", "serve"],
        },
        "devices": [{"name": name, "type": device.type, "index": device.index, **held}],
    }


def _ram_total() -> int | None:
    """Bytes of memory in this machine; None where the system does not tell."""
    import os

    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _version(package: str) -> str:
    """Of an installed package; "0.0.0" where there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "0.0.0"
