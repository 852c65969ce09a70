"""The server as one ASGI application. Start reading here.

A request passes, from the outside in: `Logged` (its id, its line in the log), `SecurityHeaders`, `SameSite` (Host and
Origin), CORS where it was asked for, `Locked` (keys), `Bounded` (size and slowness of the body), and then the routes:
one module for each API. All of them talk to the same `State`.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from octavo._version import __version__
from octavo.server import a1111, comfy, health, openai, page, problems
from octavo.server.limits import Bounded
from octavo.server.logs import Logged
from octavo.server.security import Locked, SameSite, SecurityHeaders
from octavo.server.settings import Settings
from octavo.server.state import State

ABOUT = (
    "Stable Diffusion 3.5 in 8 bits, behind the APIs that programs already speak: ComfyUI's, AUTOMATIC1111's, OpenAI's."
)
# Each has `install(app)`, which adds its routes; the later ones see only what the earlier ones left.
ROOMS = (health, a1111, openai, comfy, page)


def create_app(settings: Settings, state: State | None = None) -> FastAPI:
    """The application; it loads models once it is started, not before.

    Args:
        settings: of the server.
        state: to use instead of one made from the settings; `app.state.octavo` afterwards.
    """
    state = state or State(settings)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        state.start()
        try:
            yield
        finally:
            await state.stop()

    app = FastAPI(
        title="Octavo", version=__version__, description=ABOUT, lifespan=lifespan, docs_url=None, redoc_url=None
    )
    app.state.octavo = state
    problems.install(app)
    for room in ROOMS:
        room.install(app)

    # The one added last is the outermost.
    app.add_middleware(Bounded, max_body=settings.max_body, timeout=settings.body_timeout)
    app.add_middleware(
        Locked,
        keys=state.keys,
        allow_anonymous=settings.allow_anonymous,
        open_to_all=lambda path: state.links.name(path) is not None,
    )
    if settings.cors:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["X-Request-ID", "Retry-After"],
        )
    app.add_middleware(SameSite, host=settings.host, allowed_hosts=settings.allowed_hosts, cors=settings.cors)
    app.add_middleware(SecurityHeaders, cors=settings.cors)
    app.add_middleware(Logged)
    return app
