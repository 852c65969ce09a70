"""All of ComfyUI's routes, joined: each as it is, below `/api`, and below `/comfy`, where the page is."""

from dataclasses import dataclass

from fastapi import APIRouter, FastAPI, Response
from fastapi.routing import APIRoute

from octavo.server.comfy import assets, files, frontend, history, info, logs, queue, socket, userdata
from octavo.server.comfy.queue import KIND
from octavo.server.comfy.socket import Clients
from octavo.server.comfy.store import UserFiles
from octavo.server.state import State

PREFIXES = ("", "/api", "/comfy", "/comfy/api")
USER = "default"  # ComfyUI's name of the one user there is
ROOMS = (queue, history, files, info, assets, userdata, logs, frontend, socket)


@dataclass(frozen=True)
class Comfy:
    """What the routes share, as `app.state.comfy`."""

    clients: Clients
    user_files: UserFiles


def install(app: FastAPI) -> None:
    """Add ComfyUI's API and its page to the application."""
    state: State = app.state.octavo
    features = {
        "supports_preview_metadata": True,
        "max_upload_size": state.settings.max_body,
        "extension": {"manager": {"supports_v4": False}},
    }
    clients = Clients(features)
    for job in state.queue.jobs(("queued", "running"), kind=KIND, newest_first=False):
        clients.expect(job.id, job.payload.get("client_id"), job.payload.get("extra_data", {}))
    state.events.listen(clients.hear)
    state.viewers.append(clients.see)
    app.state.comfy = Comfy(clients, UserFiles(state.settings.user_dir / USER))
    logs.RING.attach()
    for prefix in PREFIXES:
        for room in ROOMS:
            app.include_router(room.router, prefix=prefix, include_in_schema=prefix == "")
        app.include_router(_options(), prefix=prefix, include_in_schema=False)
    frontend.install(app)


def _options() -> APIRouter:
    """ComfyUI answers OPTIONS on everything; some clients ask before they post."""
    router = APIRouter()
    paths = {route.path for room in ROOMS for route in room.router.routes if isinstance(route, APIRoute)}

    def nothing() -> Response:
        return Response()

    for path in sorted(paths):
        router.add_api_route(path, nothing, methods=["OPTIONS"])
    return router
