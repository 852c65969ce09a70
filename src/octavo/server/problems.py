"""What a client is told when something cannot be done: one status and one JSON shape for each API.

Every `OctavoError` becomes a 4xx with its text, but for a queue that cannot be used. Anything else is a fault of ours:
500, a request id to look for in the log, and nothing of the inside.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from octavo import errors
from octavo.errors import OctavoError

if TYPE_CHECKING:
    from starlette.types import Scope


class Refused(OctavoError):  # noqa: N818 - it is an answer to be given
    """A request that the server turns down, with the HTTP status to say so.

    Args:
        text: for the user.
        status: HTTP status.
        kind: a word for programs.
        param: the field at fault, if one is.
        headers: for the answer.
    """

    def __init__(
        self,
        text: str,
        *,
        status: int = 400,
        kind: str = "invalid_request",
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(text)
        self.status, self.kind, self.param, self.headers = status, kind, param, dict(headers or {})


# By kind of error, the nearest first: HTTP status and a word for programs.
STATUSES: Sequence[tuple[type[OctavoError], int, str]] = (
    (errors.QueueFullError, 429, "queue_full"),
    (errors.QueueError, 503, "queue_unavailable"),
    (errors.ShutdownError, 503, "shutting_down"),
    (errors.DeadlineExceededError, 408, "deadline_exceeded"),
    (errors.JobCancelledError, 409, "cancelled"),
    (errors.ConflictError, 409, "conflict"),
    (errors.ModelNotFoundError, 404, "model_not_found"),
    (errors.RequestError, 400, "invalid_request"),
    (OctavoError, 422, "cannot_be_done"),
)


def status_of(error: OctavoError) -> tuple[int, str]:
    """HTTP status and a word for programs."""
    if isinstance(error, Refused):
        return error.status, error.kind
    return status_of_type(type(error))


def status_of_type(kind: type[OctavoError]) -> tuple[int, str]:
    """HTTP status of errors of this kind, and a word for programs."""
    return next((status, word) for of, status, word in STATUSES if issubclass(kind, of))


def headers_of(error: OctavoError) -> dict[str, str]:
    """What the answer's header says beside."""
    if isinstance(error, Refused):
        return error.headers
    wait = 5 if isinstance(error, errors.ShutdownError) else getattr(error, "retry_after", None)
    return {"Retry-After": str(max(1, round(wait)))} if wait is not None else {}


def body_of(path: str, status: int, kind: str, text: str, param: str | None = None) -> dict[str, Any]:
    """The JSON of a refusal in the shape of the API that `path` belongs to."""
    if path.startswith("/v1/"):
        of = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}.get(
            status, "invalid_request_error" if status < 500 else "server_error"
        )
        return {"error": {"message": text, "type": of, "param": param, "code": kind}}
    if path.startswith("/sdapi/"):
        return {"error": kind, "detail": text, "body": "", "errors": text} | ({"param": param} if param else {})
    error = {"type": kind, "message": text, "details": "", "extra_info": {}}
    return {"error": error | ({"param": param} if param else {}), "node_errors": {}}


def answer(
    scope: "Scope",
    status: int,
    kind: str,
    text: str,
    *,
    param: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """A refusal as a response."""
    return JSONResponse(body_of(scope["path"], status, kind, text, param), status, dict(headers or {}))


def install(app: FastAPI) -> None:
    """Have the application answer every error in these shapes."""

    async def ours(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, OctavoError)
        status, kind = status_of(error)
        text = request.app.state.octavo.places.hidden(str(error))
        return answer(request.scope, status, kind, text, param=getattr(error, "param", None), headers=headers_of(error))

    async def http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        kind = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
        return answer(request.scope, error.status_code, kind, str(error.detail), headers=error.headers)

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        # OpenAI's clients know 400 for this; FastAPI's own status elsewhere.
        status = 400 if request.scope["path"].startswith("/v1/") else 422
        first = error.errors()[0] if error.errors() else {"loc": (), "msg": "The request cannot be read."}
        where = ".".join(str(part) for part in first["loc"][1:])
        text = f"{where or 'The body'}: {first['msg']}."
        return answer(request.scope, status, "invalid_request", text, param=where or None)

    app.add_exception_handler(OctavoError, ours)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(RequestValidationError, invalid)
