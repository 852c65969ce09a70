"""From settings to an open door: the socket, uvicorn with bounds on slow clients, and an end in good order."""

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp

from octavo.errors import RequestError
from octavo.server.app import create_app
from octavo.server.readers import Socket, Web
from octavo.server.settings import Settings
from octavo.server.state import Load, State

HEADER_TIMEOUT = 20.0  # seconds from a connection, or from its first byte, to the end of a request's header
LARGEST_HEADER = 64 * 1024  # bytes
LARGEST_MESSAGE = 1024 * 1024  # bytes of one that comes through a websocket
MOST_CONNECTIONS = 900  # at once; more are told to come back (503). Below the usual limit of 1024 open files
LEAVING = 3  # seconds that open answers have when the server stops


class Door(Web):
    """uvicorn's HTTP/1.1, hanging up on who opens a connection and does not say what it wants."""

    _waiting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        # After an answer, uvicorn's keep-alive timer runs until the next byte; from there on it is ours.
        if self._waiting is None and (self.cycle is None or self.cycle.response_complete):
            self._wait()
        before = self.cycle
        super().data_received(data)
        if self.cycle is not before or self.transport.get_protocol() is not self:
            self._stop_waiting()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def _wait(self) -> None:
        self._waiting = self.loop.call_later(HEADER_TIMEOUT, self._hang_up)

    def _hang_up(self) -> None:
        self._waiting = None
        self.transport.abort()

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None


class Server(uvicorn.Server):
    """A uvicorn server that ends by itself when its models cannot be loaded."""

    def __init__(self, settings: Settings, *, load: Load | None = None) -> None:
        self.settings = settings
        self.state = State(settings, load=load)
        self.state.failed = self.leave
        super().__init__(configured(create_app(settings, self.state), settings))

    def leave(self) -> None:
        """Stop at the next opportunity."""
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # Those who wait for a picture are told, so that their connections end now.
        self.state.leaving.set()
        await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, but a stop that was asked for is no failure: the signal is not raised again afterwards."""
        with super().capture_signals():
            yield
            self._captured_signals.clear()


def configured(app: ASGIApp, settings: Settings) -> uvicorn.Config:
    """uvicorn's settings."""
    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        loop="asyncio",
        http=Door,
        ws=Socket,
        ws_max_size=LARGEST_MESSAGE,
        ws_per_message_deflate=False,  # messages are short, or pictures: packing them costs the steps a core's time
        h11_max_incomplete_event_size=LARGEST_HEADER,
        limit_concurrency=MOST_CONNECTIONS,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=LEAVING,
        lifespan="on",
        log_config=None,
        access_log=False,
        # Whom a proxy speaks for is told by --allowed-host and keys, not by headers that anyone can write.
        proxy_headers=False,
        server_header=False,
    )


def bind(settings: Settings) -> socket.socket:
    """The socket to listen at.

    Raises:
        RequestError: no such address here, or the port is taken.
    """
    host = settings.host.strip("[]")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:
        raise RequestError(
            f"--host {settings.host}: there is no such address ({error}). Use 127.0.0.1 or 0.0.0.0."
        ) from None
    found = socket.socket(family, kind, protocol)
    try:
        # A port whose last connections are still being wound up is free; one that is listened at is not.
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(2048)
        found.setblocking(False)
    except OSError as error:
        found.close()
        if isinstance(error, PermissionError):
            reason = "this user may not open it; ports from 1024 on are for everyone"
        else:
            reason = f"{error.strerror or error}; another program may have it, such as a second server"
        raise RequestError(
            f"Cannot listen at {settings.host} port {settings.port}: {reason}. Choose another --port."
        ) from None
    return found


def address_of(listening: socket.socket, settings: Settings) -> str:
    """The address to tell people, such as http://127.0.0.1:8188."""
    host = settings.host.strip("[]")
    if host in ("0.0.0.0", "::"):
        host = socket.gethostname()
    return f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"


def run(server: Server, listening: socket.socket) -> None:
    """Serve until told to stop (SIGINT, SIGTERM), or until it turns out that the models cannot be loaded.

    Raises:
        OctavoError: why they cannot.
    """
    server.run(sockets=[listening])
    if server.state.problem is not None:
        raise server.state.problem
