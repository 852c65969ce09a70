"""How the server is: alive, ready, and in numbers; and a page of its routes that needs nothing from elsewhere."""

from html import escape
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from pydantic import BaseModel

from octavo._version import __version__
from octavo.server.state import TheState

router = APIRouter(tags=["server"])


class Health(BaseModel):
    status: str = "ok"
    version: str = __version__


class Ready(BaseModel):
    ready: bool
    stage: str  # what the server is doing on its way
    problem: str | None = None  # why it never will be ready


@router.get("/health")
async def health() -> Health:
    """Whether the server answers at all."""
    return Health()


@router.get("/ready", responses={503: {"model": Ready}})
async def ready(state: TheState) -> JSONResponse:
    """Whether the model is in memory: 200, or 503 with what is being done."""
    found = Ready(ready=state.is_ready, stage=state.stage, problem=None if state.problem is None else "see the log")
    return JSONResponse(found.model_dump(), 200 if found.ready else 503, {} if found.ready else {"Retry-After": "2"})


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
def metrics(state: TheState) -> Response:
    """Everything that is counted, for Prometheus."""
    return Response(state.metrics.render(), media_type=state.metrics.CONTENT_TYPE)


@router.get("/docs", include_in_schema=False)
def docs(request: Request) -> HTMLResponse:
    """Every route, in words; the same as /openapi.json."""
    return HTMLResponse(page_of(request.app.openapi()))


STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h2 { margin: 2rem 0 .5rem } details { border-top: 1px solid #8884; padding: .4rem 0 }
summary { cursor: pointer } code, pre { font: .875rem/1.4 ui-monospace, monospace } pre { overflow-x: auto }
b { display: inline-block; min-width: 4rem } table { border-collapse: collapse } td, th { text-align: left;
padding: .15rem 1rem .15rem 0; vertical-align: top } .wide { overflow-x: auto }
"""


def page_of(schema: dict[str, Any]) -> str:
    """The OpenAPI description as one page of HTML, without scripts."""
    by_tag = dict[str, list[str]]()
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            for tag in operation.get("tags", ["other"])[:1]:
                by_tag.setdefault(tag, []).append(_operation(schema, path, method, operation))
    rooms = "".join(f"<h2>{escape(tag)}</h2>{''.join(operations)}" for tag, operations in by_tag.items())
    title = f"{escape(schema['info']['title'])} {escape(schema['info']['version'])}"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style><h1>{title}</h1>'
        f"<p>{escape(schema['info'].get('description', ''))}</p>"
        '<p>For programs: <a href="/openapi.json">/openapi.json</a>.</p>'
        f"{rooms}</html>"
    )


def _operation(schema: dict[str, Any], path: str, method: str, operation: dict[str, Any]) -> str:
    rows = [
        (each["name"], f"{each['in']}, {_type(schema, each.get('schema', {}))}", each.get("description", ""))
        for each in operation.get("parameters", ())
    ]
    for media, content in operation.get("requestBody", {}).get("content", {}).items():
        of = _resolved(schema, content.get("schema", {}))
        needed = of.get("required", ())
        rows += [
            (f"{name}{' *' if name in needed else ''}", _type(schema, each), each.get("description", ""))
            for name, each in of.get("properties", {}).items()
        ] or [("body", media, "")]
    table = "".join(
        f"<tr><td><code>{escape(name)}</code><td>{escape(kind)}<td>{escape(about)}" for name, kind, about in rows
    )
    first, _, rest = operation.get("description", "").partition("\n")
    about = f"<p>{escape(rest)}" if rest.strip() else ""
    return (
        f"<details><summary><b>{method.upper()}</b> <code>{escape(path)}</code> {escape(first)}</summary>{about}"
        f'<div class="wide"><table>{table}</table></div></details>'
    )


def _resolved(schema: dict[str, Any], of: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in of:
        found: Any = schema
        for part in of["$ref"].removeprefix("#/").split("/"):
            found = found[part]
        of = found
    return of


def _type(schema: dict[str, Any], of: dict[str, Any]) -> str:
    """What a value may be, in few words; that it may be left out goes without saying."""
    of = _resolved(schema, of)
    if "anyOf" in of:
        return " or ".join(_type(schema, each) for each in of["anyOf"] if each.get("type") != "null")
    kind = " | ".join(map(str, of["enum"])) if "enum" in of else str(of.get("type", "anything"))
    default = f" = {of['default']!r}" if of.get("default") not in (None, "") else ""
    return kind + default


def install(app: FastAPI) -> None:
    """Add these routes."""
    app.include_router(router)
