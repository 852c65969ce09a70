"""What the server writes about itself: one line a request, as text or JSON, and never a secret.

Neither query strings nor headers nor bodies are written, and what looks like a key of ours is blotted out wherever it
turns up. Every request has an id (`X-Request-ID`, taken over or made here) that its lines and its answer carry.
"""

import json
import logging
import re
import secrets
import time
from contextvars import ContextVar
from typing import TextIO

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from octavo.server import problems
from octavo.server.keys import MARK

access = logging.getLogger("octavo.server.access")
logger = logging.getLogger(__name__)

request_id: ContextVar[str] = ContextVar("request_id", default="")
SECRET = re.compile(re.escape(MARK) + r"[A-Za-z0-9_-]{20,}|(?<=[Bb]earer )\S+|(?<=[Bb]asic )\S+|(?<=token=)[^&\s]+")
ACCEPTED_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
QUIET = frozenset({"/health", "/ready", "/metrics"})  # asked every few seconds by programs
FIELDS = ("request_id", "client", "method", "path", "status", "ms", "job")


class Blotted(logging.Filter):
    """Takes secrets out of a line, and adds the request's id."""

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        blotted = SECRET.sub("[secret]", text)
        if blotted != text:
            record.msg, record.args = blotted, ()
        if not hasattr(record, "request_id"):
            record.request_id = request_id.get()
        return True


class Plain(logging.Formatter):
    """`12:00:00 INFO GET /health 200 0.4 ms [id]`"""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(message)s", "%Y-%m-%d %H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        tag = getattr(record, "request_id", "")
        text = super().format(record)
        return f"{text} [{tag}]" if tag else text


class Json(logging.Formatter):
    """One JSON object a line: time, level, logger, message, and what is known of the request."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: getattr(record, name) for name in FIELDS if getattr(record, name, "") not in ("", None)}
        if record.exc_info:
            line["error"] = SECRET.sub("[secret]", self.formatException(record.exc_info))
        return json.dumps(line, ensure_ascii=False)


def set_up(stream: TextIO, *, form: str, level: str) -> None:
    """Send the lines of Octavo, uvicorn and Python's warnings to `stream`, and nowhere else."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(Json() if form == "json" else Plain())
    handler.addFilter(Blotted())
    for name in ("octavo", "uvicorn", "py.warnings"):
        named = logging.getLogger(name)
        named.handlers = [handler]
        named.propagate = False
        named.setLevel(level.upper())
    for name in ("uvicorn.error", "uvicorn.access", "uvicorn.asgi"):
        logging.getLogger(name).handlers = []
    # We write those lines ourselves.
    logging.getLogger("uvicorn.access").disabled = True
    if level != "debug":
        # It tells of its own starting and of every websocket, twice.
        logging.getLogger("uvicorn").setLevel("WARNING")


class Logged:
    """Gives each request its id, writes its line, and turns a fault of ours into a 500 that tells nothing."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        own = given if ACCEPTED_ID.fullmatch(given) else secrets.token_hex(8)
        token = request_id.set(own)
        start, status = time.perf_counter(), 0

        async def with_id(message: Message) -> None:
            nonlocal status
            if message["type"] in ("http.response.start", "websocket.http.response.start"):
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), (b"x-request-id", own.encode())]}
            elif message["type"] == "websocket.accept":
                status = 101
            elif message["type"] == "websocket.close" and not status:
                status = 403
            await send(message)

        try:
            await self._app(scope, receive, with_id)
        except Exception:
            logger.exception("%s %s failed by a fault of ours", scope.get("method", "WS"), _line(scope["path"]))
            if status:
                # The answer has begun; uvicorn closes the connection, which tells the client that it is not whole.
                raise
            text = f"Something went wrong inside the server. Its log has more under the request id {own}."
            if scope["type"] == "http":
                await problems.answer(scope, 500, "internal_error", text)(scope, receive, with_id)
            else:
                await with_id({"type": "websocket.close", "code": 1011})
        finally:
            self._write(scope, status, (time.perf_counter() - start) * 1000)
            request_id.reset(token)

    def _write(self, scope: Scope, status: int, ms: float) -> None:
        method = scope.get("method", "WS")
        path = _line(scope["path"])
        level = logging.DEBUG if path in QUIET and status < 400 else logging.INFO
        client = getattr(scope.get("octavo.caller"), "name", None)
        extra = {"client": client, "method": method, "path": path, "status": status, "ms": round(ms, 2)}
        access.log(level, "%s %s %s %.1f ms", method, path, status or "left", ms, extra=extra)


def _line(path: str) -> str:
    """The path on one line: a name in it could hold anything."""
    return path[:300].encode("unicode_escape").decode("ascii")
