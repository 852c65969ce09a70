"""Who may come in, and to which files: Host and Origin, keys, the folders that names may lead into.

`docs/security.md` says what is promised. The middlewares are plain ASGI and cover websockets as well; each refuses
before the application sees anything of the request.
"""

import base64
import binascii
import logging
import re
import socket
from collections.abc import Callable, Mapping, Sequence
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import parse_qs

from starlette.datastructures import Headers
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from octavo.errors import RequestError
from octavo.server import problems
from octavo.server.keys import ANONYMOUS, Caller, Keys

logger = logging.getLogger(__name__)

OPEN_TO_ALL = frozenset({"/health", "/ready"})  # for those who watch over the server; they tell nothing of use
DEFAULT_PORTS = {"http": "80", "https": "443", "ws": "80", "wss": "443"}
PORT = re.compile(r"(:\d{1,5})?", re.ASCII)
LONGEST_NAME = 1024  # letters of a file's name

# Pictures and previews are shown from blobs and data; ComfyUI's page compiles scripts and styles as it goes.
CONTENT_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; "
    "worker-src 'self' blob:; frame-src 'self'; frame-ancestors 'self'; object-src 'none'; base-uri 'self'; "
    "form-action 'self'"
)
SECURITY_HEADERS: Mapping[str, str] = {
    "content-security-policy": CONTENT_POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "SAMEORIGIN",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}


def jail(root: Path, name: str) -> Path:
    """The file that `name`, which came from outside, means in the folder `root`; it need not exist.

    Raises:
        RequestError: it leads out of the folder: by `..`, an absolute path, a drive, a backslash, a control character,
            or a symbolic link.
    """
    bad = RequestError(f"'{name[:100]}' is no name of a file here.")
    if not name or len(name) > LONGEST_NAME or "\\" in name or not name.isprintable():
        raise bad
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts) or ":" in parts[0]:
        raise bad
    try:
        real_root = root.resolve()
        path = real_root.joinpath(*parts)
        real = path.resolve()
    except (OSError, ValueError, RuntimeError):  # a loop of links, a name too long for the disk
        raise bad from None
    if real == real_root or not real.is_relative_to(real_root):
        raise bad
    return real


class SecurityHeaders:
    """Adds to every answer what tells browsers to be careful with it."""

    def __init__(self, app: ASGIApp, *, cors: Sequence[str] = ()) -> None:
        self._app = app
        headers = dict(SECURITY_HEADERS)
        if cors:
            headers["cross-origin-resource-policy"] = "cross-origin"
        self._headers = [(name.encode(), value.encode()) for name, value in headers.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                given = list(message.get("headers", ()))
                names = {name.lower() for name, _ in given}
                message = {**message, "headers": given + [each for each in self._headers if each[0] not in names]}
            await send(message)

        await self._app(scope, receive, with_headers)


class SameSite:
    """Refuses requests that a foreign web page sends through its visitor's browser.

    The Host must be a name of this server: a page whose own name was bent to our address (DNS rebinding) gives itself
    away by it. An Origin must be ours, or one that was allowed: so no foreign page can post (CSRF) or open a websocket.
    What browsers send without an Origin from foreign pages (pictures, scripts) is told by Sec-Fetch-Site.
    """

    def __init__(self, app: ASGIApp, *, host: str, allowed_hosts: Sequence[str] = (), cors: Sequence[str] = ()) -> None:
        self._app = app
        own = {"localhost", host.lower(), socket.gethostname().lower()}
        self._names = own | {name.lower() for name in allowed_hosts}
        self._any_name = "*" in allowed_hosts
        self._origins = frozenset(origin.lower() for origin in cors)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            text = self._against(
                scope["type"], scope["method"] if scope["type"] == "http" else "GET", Headers(scope=scope)
            )
            if text is not None:
                await refuse(scope, receive, send, 403, "forbidden", text)
                return
        await self._app(scope, receive, send)

    def _against(self, kind: str, method: str, headers: Headers) -> str | None:
        """Why the request is refused; None where it is not."""
        if len(headers.getlist("host")) > 1 or len(headers.getlist("origin")) > 1:
            return "The request has two Host or Origin headers."
        host, origin = headers.get("host", "").lower(), headers.get("origin")
        if not self._known(host):
            return (
                f"This server is not called '{host[:100]}'. If it should be, start it with --allowed-host "
                f"{host_name(host)[:100] or 'NAME'}."
            )
        if origin is not None:
            if self._allowed(origin.lower()) or _same(origin.lower(), host):
                return None
            return f"Pages of '{origin[:100]}' may not call this server; --cors allows them."
        site = headers.get("sec-fetch-site", "none")
        if site in ("cross-site", "same-site") and not self._origins:
            # Following a link is fine; loading a part of a foreign page, or posting, is not.
            if kind == "http" and method in ("GET", "HEAD") and headers.get("sec-fetch-mode") == "navigate":
                return None
            return "Pages of other sites may not call this server; --cors allows them."
        return None

    def _known(self, host: str) -> bool:
        name = host_name(host)
        if not PORT.fullmatch(host[len(name) :]):
            return False
        if self._any_name or name in self._names or name.endswith(".localhost"):
            return True
        try:
            # An address is no name: nothing can be bent.
            ip_address(name.strip("[]"))
        except ValueError:
            return False
        return True

    def _allowed(self, origin: str) -> bool:
        return "*" in self._origins or origin in self._origins


def host_name(host: str) -> str:
    """`host` without its port."""
    if host.startswith("[") and "]" in host:
        return host.partition("]")[0] + "]"
    return host.partition(":")[0]


def _same(origin: str, host: str) -> bool:
    """Whether `origin` (scheme://host:port) is the site that `host` (host:port) names."""
    scheme, _, place = origin.partition("://")
    default = DEFAULT_PORTS.get(scheme, "")
    return bool(place) and scheme in DEFAULT_PORTS and _with_port(place, default) == _with_port(host, default)


def _with_port(place: str, default: str) -> tuple[str, str]:
    name = host_name(place)
    return name, place[len(name) :].removeprefix(":") or default


class Locked:
    """Lets in who shows a key, where there are keys."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: Keys,
        allow_anonymous: bool = False,
        open_to_all: Callable[[str], bool] = lambda _path: False,
    ) -> None:
        self._app, self._keys, self._allow_anonymous = app, keys, allow_anonymous
        self._open_to_all = open_to_all

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        keys, path, caller = self._keys, scope["path"], None
        shown = shown_keys(scope)
        try:
            locked = bool(keys)
            # A browser may send an old password beside a good key.
            caller = next((found for key in shown if (found := keys.caller(key))), None)
        except RequestError as error:
            logger.error("%s", error)
            await refuse(scope, receive, send, 503, "keys_unreadable", "The server cannot read its keys; see its log.")
            return
        unasked = path in OPEN_TO_ALL or self._open_to_all(path) or (self._allow_anonymous and not shown)
        if caller is None and (not locked or unasked):
            caller = ANONYMOUS
        if caller is None:
            text = "The key is not known here." if shown else "This server wants a key: Authorization: Bearer KEY."
            # With Basic, browsers ask their user: any name, and the key as password.
            challenge = {"WWW-Authenticate": 'Basic realm="Octavo: any name, and the key as password", charset="UTF-8"'}
            await refuse(scope, receive, send, 401, "invalid_api_key", text, challenge)
            return
        scope["octavo.caller"] = caller
        await self._app(scope, receive, send)


def caller_of(connection: HTTPConnection) -> Caller:
    """Who sent the request."""
    caller = connection.scope.get("octavo.caller", ANONYMOUS)
    assert isinstance(caller, Caller)
    return caller


def shown_keys(scope: Scope) -> list[str]:
    """The keys in a request: Bearer, Basic's password, X-API-Key, and `?token=` of websockets, which browsers can give
    no headers."""
    headers = Headers(scope=scope)
    found = list[str]()
    scheme, _, value = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        found.append(value.strip())
    elif scheme.lower() == "basic":
        try:
            found.append(base64.b64decode(value, validate=True).decode("utf-8").partition(":")[2])
        except (binascii.Error, UnicodeDecodeError):
            found.append("")
    if "x-api-key" in headers:
        found.append(headers["x-api-key"])
    if scope["type"] == "websocket":
        query = parse_qs(scope.get("query_string", b"").decode("latin-1"))
        found += query.get("token", [])
    return found


async def refuse(
    scope: Scope,
    receive: Receive,
    send: Send,
    status: int,
    kind: str,
    text: str,
    headers: Mapping[str, str] | None = None,
) -> None:
    """Answer for the application: an HTTP refusal, or a websocket that is not opened."""
    if scope["type"] == "websocket" and "websocket.http.response" not in scope.get("extensions", {}):
        await send({"type": "websocket.close", "code": 1008, "reason": text[:100]})
        return
    await problems.answer(scope, status, kind, text, headers=headers)(scope, receive, send)
