"""Models and pictures as one list, `/assets`, for pages that browse them so; and `/internal/files`, plain names."""

import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse

from octavo.graph.lists import pictures_in
from octavo.server.comfy.bodies import whole_number
from octavo.server.state import State, TheState

router = APIRouter(tags=["ComfyUI: what there is"])

MOST = 500  # assets in one answer
USUAL = 20  # where the client names no limit
NAMES = uuid.uuid5(uuid.NAMESPACE_URL, "octavo:assets")  # ids follow from tags and names


@router.get("/assets")
async def assets(
    state: TheState,
    include_tags: Annotated[str, Query(description="separated by commas: models, checkpoints, input …")] = "",
    exclude_tags: str = "",
    name_contains: str = "",
    limit: str | None = None,
    offset: str | None = None,
) -> JSONResponse:
    """Models, and pictures in the input folder, a page at a time."""
    await state.until_started()
    most = min(whole_number(limit, "limit", least=1) or USUAL, MOST)
    start = whole_number(offset, "offset", least=0) or 0
    wanted, unwanted = _words(include_tags), _words(exclude_tags)

    def found() -> list[dict[str, Any]]:
        return [
            each
            for each in _all(state)
            if wanted <= set(each["tags"])
            and not unwanted & set(each["tags"])
            and name_contains.lower() in each["name"].lower()
        ]

    every = await run_in_threadpool(found)
    page = every[start : start + most]
    return JSONResponse({"assets": page, "total": len(every), "has_more": start + len(page) < len(every)})


@router.get("/internal/files/{kind}")
def files_in(kind: str, state: TheState) -> JSONResponse:
    """Names of the pictures in the folder input, output or temp, the newest first."""
    settings = state.settings
    folders = {"input": settings.inputs, "output": settings.output_dir, "temp": settings.temp_dir}
    if kind not in folders:
        return JSONResponse({"error": "Invalid directory type"}, 400)
    return JSONResponse([path.name for path in _newest_first(folders[kind])])


def _all(state: State) -> Iterator[dict[str, Any]]:
    for file in state.shelf.folders.files():
        if file.path.is_file():
            yield _asset(file.name, file.path, ["models", file.category])
    for path in _newest_first(state.settings.inputs):
        yield _asset(path.name, path, ["input"])


def _asset(name: str, path: Path, tags: list[str]) -> dict[str, Any]:
    about = path.stat()
    changed = datetime.fromtimestamp(about.st_mtime, UTC).replace(tzinfo=None).isoformat()
    return {
        "id": str(uuid.uuid5(NAMES, "/".join((*tags, name)))),
        "name": name,
        "size": about.st_size,
        "tags": tags,
        "created_at": changed,
        "updated_at": changed,
        "last_access_time": changed,
    }


def _words(text: str) -> set[str]:
    return {word.strip() for word in text.split(",") if word.strip()}


def _newest_first(folder: Path) -> list[Path]:
    return sorted((folder / name for name in pictures_in(folder)), key=lambda path: -path.stat().st_mtime)
