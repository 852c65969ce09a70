"""Routes for what the page keeps: `/users`, `/settings`, `/userdata`. The keeping itself is `store`'s."""

import uuid
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import unquote

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse

from octavo.server.comfy.bodies import TEXT, JsonBody, JsonObject, described, text_field
from octavo.server.comfy.files import file_answer
from octavo.server.comfy.store import UserFiles, files_below
from octavo.server.problems import Refused

router = APIRouter(tags=["ComfyUI: user"])


def the_files(request: Request) -> UserFiles:
    """The one user's files; one object for each server, for it holds a lock."""
    files = request.app.state.comfy.user_files
    assert isinstance(files, UserFiles)
    return files


TheFiles = Annotated[UserFiles, Depends(the_files)]


ANY_BODY: dict[str, Any] = {"requestBody": {"content": {"application/json": {"schema": {}}}, "required": True}}


def the_names(request: Request, file: str, dest: str = "") -> tuple[str, str | None]:
    """The file that a path names, and where it is moved to, if it is.

    Names have their slashes as %2F, and a file may lie in a folder called `move`: only the path as it was sent tells
    the one from the other.
    """
    raw: bytes | None = request.scope.get("raw_path")
    if raw is None:
        return file, dest or None
    parts = [unquote(part) for part in raw.decode("ascii", "replace").partition("/userdata/")[2].split("/")]
    if len(parts) == 3 and parts[1] == "move":
        return parts[0], parts[2]
    return "/".join(parts), None


def the_name(request: Request, file: str) -> str:
    """The file that a path names."""
    return the_names(request, file)[0]


TheName = Annotated[str, Depends(the_name)]
TheNames = Annotated[tuple[str, str | None], Depends(the_names)]


async def read_body(request: Request) -> bytes:
    """What was sent, as it is."""
    return await request.body()


# Users


@router.get("/users")
def get_users(files: TheFiles) -> dict[str, Any]:
    """How users are kept: on the server, and there is one."""
    return {"storage": "server", "migrated": files.folder.exists()}


@router.post("/users", openapi_extra=described(["username"], username=TEXT))
def post_users(body: JsonObject) -> str:
    """A name for a new user. There is one folder for all, so nothing but the answer differs."""
    name = text_field(body, "username")
    safe = "".join(letter for letter in (name or "").strip() if letter.isalnum() or letter in "-_ ")[:64]
    if not safe:
        raise Refused("A user needs a 'username' of letters and digits.", param="username")
    return f"{safe}_{uuid.uuid4()}"


# Settings


@router.get("/settings")
def get_settings(files: TheFiles) -> dict[str, Any]:
    """All settings of the page."""
    return files.settings()


@router.post("/settings", openapi_extra=described())
def post_settings(body: JsonObject, files: TheFiles) -> Response:
    """Change some settings."""
    files.change_settings(body)
    return Response()


@router.get("/settings/{id}")
def get_setting(id: str, files: TheFiles) -> Any:
    """One setting; null where it was never set."""
    return JSONResponse(files.settings().get(id))


@router.post("/settings/{id}", openapi_extra=ANY_BODY)
def post_setting(id: str, body: JsonBody, files: TheFiles) -> Response:
    """Change one setting to whatever JSON is sent."""
    files.change_settings({id: body})
    return Response()


# Files


@router.get("/userdata")
def list_userdata(
    files: TheFiles,
    directory: Annotated[str, Query(alias="dir", description="folder below the user's")] = "",
    recurse: str = "false",
    full_info: str = "false",
    split: str = "false",
) -> Response:
    """Names of the files in a folder; with size and times (`full_info`), or cut at the slashes (`split`)."""
    if not directory:
        return PlainTextResponse("Directory not provided", 400)
    folder = files.path(directory)
    if not folder.is_dir():
        return PlainTextResponse("Directory not found", 404)
    found = [(path, path.relative_to(folder).as_posix()) for path in files_below(folder, recurse=_true(recurse))]
    if _true(full_info):
        return JSONResponse([_info(path, name) for path, name in found])
    return JSONResponse([[name, *name.split("/")] if _true(split) else name for _, name in found])


@router.get("/v2/userdata")
def list_userdata_v2(files: TheFiles, path: str = "") -> Response:
    """Folders, then files, below a folder."""
    folder = files.path(path) if path.strip("/") else files.folder.resolve()
    if not folder.is_dir():
        return PlainTextResponse("Requested path not found", 404)
    below = list(files_below(folder, recurse=True))
    folders = {parent for each in below for parent in each.parents if parent != folder and folder in parent.parents}
    entries: list[dict[str, Any]] = [
        {"name": each.name, "path": files.name_of(each), "type": "directory"} for each in sorted(folders)
    ]
    for each in below:
        about = each.stat()
        entry = {"name": each.name, "path": files.name_of(each), "type": "file"}
        entries.append(entry | {"size": about.st_size, "modified": about.st_mtime})
    return JSONResponse(entries)


@router.get("/userdata/{file:path}")
def get_userdata(name: TheName, files: TheFiles) -> FileResponse:
    """A file. Slashes in its name are written %2F."""
    path = files.path(name)
    if not path.is_file():
        raise Refused(f"There is no file '{name}'.", status=404, kind="not_found")
    return file_answer(path)


@router.post("/userdata/{file:path}/move/{dest:path}")
def move_userdata(
    names: TheNames,
    files: TheFiles,
    content: Annotated[bytes, Depends(read_body)],
    overwrite: str = "true",
    full_info: str = "false",
) -> Response:
    """Give a file another name."""
    name, target = names
    replace = overwrite.lower() != "false"
    if target is None:
        path = files.write(name, content, overwrite=replace)  # a file in a folder called `move`
    else:
        path = files.move(name, target, overwrite=replace)
    called = files.name_of(path)
    return JSONResponse(_info(path, called) if _true(full_info) else called)


@router.post("/userdata/{file:path}", openapi_extra=ANY_BODY)
def post_userdata(
    name: TheName,
    files: TheFiles,
    content: Annotated[bytes, Depends(read_body)],
    overwrite: str = "true",
    full_info: str = "false",
) -> Response:
    """Write a file, whatever is sent."""
    return move_userdata((name, None), files, content, overwrite, full_info)


@router.delete("/userdata/{file:path}", status_code=204)
def delete_userdata(name: TheName, files: TheFiles) -> Response:
    """Take a file away."""
    files.delete(name)
    return Response(status_code=204)


def _info(path: Path, name: str) -> dict[str, Any]:
    about = path.stat()
    return {"path": name, "size": about.st_size, "modified": about.st_mtime, "created": about.st_ctime}


def _true(word: str) -> bool:
    return word.lower() == "true"
