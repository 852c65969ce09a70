"""Our own page at `/`: a few files that a browser runs as they are, and the routes under `/octavo` that they call."""

from importlib.resources import files
from mimetypes import guess_type

from fastapi import FastAPI
from fastapi.responses import Response

from octavo.server.page import api
from octavo.server.problems import Refused

# Nothing of it is inline, so the page may run no other script than its own.
POLICY = (
    "default-src 'self'; img-src 'self' blob: data:; object-src 'none'; base-uri 'none'; frame-ancestors 'none'; "
    "form-action 'none'"
)
FILES = ("page.js", "hires.js", "loras.js", "refine.js", "page.css", "icon.svg")


def install(app: FastAPI) -> None:
    """Add the page and its routes."""
    app.include_router(api.router)
    app.get("/", include_in_schema=False)(page)
    app.get("/page/{name}", include_in_schema=False)(part)


def page() -> Response:
    """The page."""
    return _file("index.html")


def part(name: str) -> Response:
    """What the page is made of."""
    if name not in FILES:
        raise Refused(f"The page has no file '{name}'.", status=404, kind="not_found")
    return _file(name)


def _file(name: str) -> Response:
    kind = {"js": "text/javascript"}.get(name.rpartition(".")[2]) or guess_type(name)[0] or "text/plain"
    headers = {"Cache-Control": "no-cache", "Content-Security-Policy": POLICY}
    content = (files(__package__) / name).read_bytes()
    return Response(content, media_type=f"{kind}; charset=utf-8" if kind.startswith("text/") else kind, headers=headers)
