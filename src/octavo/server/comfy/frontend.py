"""ComfyUI's own page at `/comfy/`, from the package comfyui-frontend-package, and workflows for it to begin with.

The package is GPL and none of it is in Octavo: it is installed by who wants it (`octavo[comfyui]`), and its files are
handed out as they are. The page calls its server below its own address: `/comfy/api/…`, `/comfy/ws`.
"""

import json
from functools import cache
from importlib.util import find_spec
from os import PathLike, stat_result
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from octavo.server.comfy.files import file_answer
from octavo.server.comfy.userdata import TheFiles
from octavo.server.problems import Refused

PACKAGE = "comfyui-frontend-package"
MODULE = "comfyui_frontend_package"
TEMPLATES = Path(__file__).parent / "templates"
# Types that a page depends on; what the system's table says of them varies.
SCRIPT_TYPES = {".js": "text/javascript", ".mjs": "text/javascript", ".css": "text/css", ".json": "application/json",
                ".wasm": "application/wasm", ".woff2": "font/woff2", ".svg": "image/svg+xml"}  # fmt: skip
FOREVER = "public, max-age=31536000, immutable"  # for files whose names change with their contents

NOT_INSTALLED = """<!doctype html><html lang="en"><meta charset="utf-8"><title>ComfyUI's page is not installed</title>
<meta name="viewport" content="width=device-width"><style>:root{color-scheme:light dark;font:16px/1.6 system-ui}
body{max-width:40rem;margin:15vh auto;padding:0 1rem}pre{padding:1rem;overflow-x:auto;background:#8882}</style>
<h1>ComfyUI's page is not installed</h1><p>This server speaks ComfyUI's API, but the page itself is a package
of its own. Install it where Octavo is installed, and start the server again:</p>
<pre>pip install 'octavo[comfyui]'</pre>
<p>Octavo's own page is at <a href="/">/</a>.</p></html>
"""

router = APIRouter(include_in_schema=False)


class PageFiles(StaticFiles):
    """The package's files: hashed ones may be kept for good, all else is asked for again."""

    def file_response(
        self, full_path: str | PathLike[str], stat_result: stat_result, scope: Scope, status_code: int = 200
    ) -> Response:
        response = super().file_response(full_path, stat_result, scope, status_code)
        path = Path(full_path)
        response.headers["Cache-Control"] = FOREVER if path.parent.name == "assets" else "no-cache"
        if path.suffix in SCRIPT_TYPES and "content-type" in response.headers:
            response.headers["Content-Type"] = SCRIPT_TYPES[path.suffix]
        return response


@cache
def page_folder() -> Path | None:
    """Where the package keeps the page; None where it is not installed."""
    spec = find_spec(MODULE)
    folders = [Path(place) / "static" for place in (spec.submodule_search_locations or ())] if spec else []
    return next((folder for folder in folders if (folder / "index.html").is_file()), None)


@cache
def extension_scripts() -> list[str]:
    """The page's scripts that it loads by name."""
    folder = page_folder()
    scripts = sorted((folder / "extensions").rglob("*.js")) if folder is not None else []
    return [f"/{path.relative_to(folder).as_posix()}" for path in scripts if folder is not None]


@router.get("/templates/index.json")
def template_index() -> JSONResponse:
    """The workflows that the page offers to begin with."""
    return JSONResponse(json.loads((TEMPLATES / "index.json").read_text("utf-8")))


@router.get("/templates/index_logo.json")
def template_logos() -> dict[str, Any]:
    """Logos of the makers of models: none."""
    return {}


@router.get("/templates/{name}")
def template(name: str) -> Response:
    """One of these workflows, or its picture."""
    path = next((each for each in TEMPLATES.iterdir() if each.name == name), None)
    if path is None:
        raise Refused(f"There is no template '{name[:100]}'.", status=404, kind="not_found")
    return file_answer(path)


def install(app: FastAPI) -> None:
    """Add the page at `/comfy/`, or one that says how to get it."""

    @app.get("/comfy", include_in_schema=False)
    def without_slash() -> RedirectResponse:
        # The page finds its server by its own address, which must end in a slash.
        return RedirectResponse("/comfy/")

    @app.get("/comfy/user.css", include_in_schema=False)
    def user_style(files: TheFiles) -> Response:
        """The user's own additions to the page's looks, if there are any."""
        path = files.path("user.css")
        return file_answer(path) if path.is_file() else Response(media_type="text/css")

    folder = page_folder()
    if folder is not None:
        # The signs in the browser's tab the page asks for at the root, wherever it is itself.
        app.mount("/assets/images", PageFiles(directory=folder / "assets" / "images"))

        @app.get("/assets/favicon.ico", include_in_schema=False)
        def icon() -> FileResponse:
            return FileResponse(folder / "assets" / "favicon.ico")

        app.mount("/comfy", PageFiles(directory=folder, html=True), name="comfy")
        return

    @app.get("/comfy/", include_in_schema=False)
    def how_to_get_it() -> HTMLResponse:
        return HTMLResponse(NOT_INSTALLED, 404)
