"""The latest lines of the log for the page's panel: `/internal/logs`. Secrets are blotted out, as in the log itself."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Request, Response

from octavo.server.comfy.bodies import TEXT, TRUTH, JsonObject, described, text_field
from octavo.server.comfy.socket import Clients
from octavo.server.logs import Blotted

router = APIRouter(tags=["ComfyUI: what there is"])

KEPT = 300  # lines
LONGEST_LINE = 2000  # letters
COLUMNS, ROWS = 120, 30  # of the page's terminal
# Handlers of `octavo` itself are set by the server's own log; these rooms are what a user may want to read of.
ROOMS = ("server", "engine", "graph", "pipeline", "checkpoint")


class Ring(logging.Handler):
    """The last lines, and whom to tell of the next one."""

    def __init__(self) -> None:
        super().__init__()
        self.addFilter(Blotted())
        self.lines: deque[dict[str, str]] = deque(maxlen=KEPT)
        self.listeners: set[Callable[[dict[str, str]], None]] = set()

    def attach(self) -> None:
        """Hear the rooms' loggers; once or often is the same."""
        for room in ROOMS:
            logging.getLogger(f"octavo.{room}").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line."""
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(record.created)) + f".{int(record.msecs):03}"
        line = {"t": when, "m": record.getMessage()[:LONGEST_LINE] + "\n"}
        self.lines.append(line)
        for listener in tuple(self.listeners):
            listener(line)


RING = Ring()  # one for the process, as the log is


@router.get("/internal/logs")
def logs() -> str:
    """The latest lines as one text."""
    return "".join(f"{line['t']} - {line['m']}" for line in tuple(RING.lines))


@router.get("/internal/logs/raw")
def raw_logs() -> dict[str, Any]:
    """The latest lines, each with its time."""
    return _entries(list(RING.lines))


@router.patch("/internal/logs/subscribe", openapi_extra=described(enabled=TRUTH, clientId=TEXT))
async def subscribe(request: Request, body: JsonObject) -> Response:
    """Send new lines to the websocket of `clientId`, or, without `enabled`, no longer.

    A client that is not connected is not remembered.
    """
    clients: Clients = request.app.state.comfy.clients
    client = text_field(body, "clientId") or ""
    if body.get("enabled") is True and clients.has(client):
        clients.log_readers.add(client)
    else:
        clients.log_readers.discard(client)
    if clients.log_readers and clients.stop_logs is None:
        clients.stop_logs = _follow(clients)
    return Response()


def _follow(clients: Clients) -> Callable[[], None]:
    """Tell those who asked of each new line; returns how to stop it."""
    loop = asyncio.get_running_loop()

    def tell(line: dict[str, str]) -> None:
        clients.broadcast("logs", _entries([line]), clients.log_readers)

    def listener(line: dict[str, str]) -> None:
        try:
            loop.call_soon_threadsafe(tell, line)
        except RuntimeError:
            # That server has stopped.
            RING.listeners.discard(listener)

    RING.listeners.add(listener)
    return lambda: RING.listeners.discard(listener)


def _entries(lines: list[dict[str, str]]) -> dict[str, Any]:
    return {"entries": lines, "size": {"cols": COLUMNS, "rows": ROWS}}
