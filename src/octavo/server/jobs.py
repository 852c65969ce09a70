"""Requests of any API on their way through the queue: accepted, followed to their end, or withdrawn.

Two headers are common to all APIs: `Idempotency-Key` (the same request sent twice is one job) and `X-Octavo-Timeout`
(seconds from now by which it must be done). Whose job it is, and its priority, come with the caller's key.
"""

import asyncio
import hashlib
import json
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any, Literal

from pydantic import BaseModel
from starlette.requests import HTTPConnection, Request

from octavo import errors
from octavo.engine.events import LAST, Event
from octavo.engine.jobs import Stored
from octavo.errors import OctavoError
from octavo.server.hub import Follower
from octavo.server.problems import Refused, status_of_type
from octavo.server.security import caller_of
from octavo.server.state import State

logger = logging.getLogger(__name__)

Api = Literal["octavo", "comfyui", "a1111", "openai"]
POLL = 2.0  # seconds after which the queue is asked, should an event have been lost
KEY = re.compile(r"[\x21-\x7e]{1,200}")
STOPS = (
    "The server stops. The request is kept, and done after the next start; if it had an Idempotency-Key, send it again "
    "with the same one for its result."
)
LONGEST_TIMEOUT = 30 * 86400.0  # seconds


class Accepted:
    """A job that is in the queue, and what happens to it from then on."""

    def __init__(self, state: State, stored: Stored, follower: Follower, *, keep: bool) -> None:
        self.stored, self.id = stored, stored.id
        self._state, self._follower, self._keep = state, follower, keep
        self._over = stored.over

    async def events(self, request: Request | None = None) -> AsyncIterator[Event]:
        """What happens to the job, its end included; nothing more where it is over already.

        When the client of `request` leaves, or the reader, the job is withdrawn, unless it has an idempotency key:
        then the client may come back for it. When the server stops, the job is kept and done after the next start.

        Raises:
            ShutdownError: the server stops.
        """
        leaving = self._state.leaving
        watching: list[asyncio.Task[Any]] = [asyncio.create_task(leaving.wait())]
        if request is not None:
            watching.append(asyncio.create_task(_left(request)))
        try:
            while not self._over:
                if (event := await self._next(watching)) is not None:
                    self._over = event.type in LAST
                    yield event
                elif leaving.is_set():
                    raise errors.ShutdownError(STOPS)
                elif watching[-1].done():
                    return
                else:
                    self._over = (await self.refreshed()).over
        finally:
            for each in watching:
                each.cancel()
            # Where the job was over before we followed it, nothing else would take the follower away.
            self._state.events.drop(self.id, self._follower)
            if not (self._over or self._keep or leaving.is_set()):
                await asyncio.shield(asyncio.to_thread(self._state.service.cancel, self.id))

    async def finish(self, request: Request | None = None) -> Stored:
        """Wait for the end.

        Returns:
            The job as it is stored, done.

        Raises:
            Refused: it failed, was cancelled or took too long; with the error's own text. 499 where the client left.
            ShutdownError: the server stops.
        """
        async for _event in self.events(request):
            pass
        stored = await self.refreshed()
        if stored.state == "done":
            return stored
        raise failure(stored)

    async def refreshed(self) -> Stored:
        """The job as it is now."""
        return await asyncio.to_thread(self._state.queue.get, self.id) or self.stored

    async def _next(self, watching: "Sequence[asyncio.Task[Any]]") -> Event | None:
        """The next event; None after a while without one, or as soon as one of the tasks is done."""
        following = asyncio.create_task(self._follower.next(POLL))
        try:
            await asyncio.wait((following, *watching), return_when=asyncio.FIRST_COMPLETED)
            return following.result() if following.done() else None
        finally:
            following.cancel()


async def submit(
    connection: HTTPConnection,
    state: State,
    kind: str,
    payload: dict[str, Any],
    *,
    api: Api,
    id: str | None = None,
    previews: bool = False,
    **more: Any,
) -> Accepted:
    """Put a job into the queue, on disk, for whoever sent the request.

    Args:
        connection: the request, for its headers and its caller.
        kind: of job: "generate" or "graph".
        payload: plain data for its runner.
        api: which door it came through.
        id: to give it; a new one if None.
        previews: whether its events are wanted with previews.
        more: for `Service.submit`, such as `front` or `fingerprint`.

    Raises:
        QueueFullError: too many wait.
        RequestError: the idempotency key stands for another request; a header makes no sense.
        DeadlineExceededError: its time was up before it was in the queue.
    """
    caller = caller_of(connection)
    key, deadline = idempotency_key(connection), deadline_of(connection, state.settings.job_timeout)
    id = id or uuid.uuid4().hex
    with_follower = Follower()
    with_follower.wants_previews = previews
    state.events.add(id, with_follower)
    try:
        stored = await asyncio.to_thread(
            state.service.submit,
            kind,
            payload,
            id=id,
            client=caller.name,
            api=api,
            priority=caller.priority,
            deadline=deadline,
            idempotency_key=key,
            **more,
        )
    except BaseException as error:
        state.events.drop(id, with_follower)
        if isinstance(error, errors.RequestError) and deadline is not None and time.time() >= deadline:
            # Busy as we are, the time was up before the queue had it.
            raise errors.DeadlineExceededError(
                "Its deadline passed before it was in the queue. Allow more time."
            ) from error
        raise
    logger.info("%s request %s accepted", api, stored.id, extra={"job": stored.id, "client": caller.name})
    if stored.id != id:
        # Sent before, with the same key: follow that one.
        state.events.drop(id, with_follower)
        state.events.add(stored.id, with_follower)
    return Accepted(state, stored, with_follower, keep=key is not None)


def fingerprint_of(body: BaseModel, *pictures: str | None) -> str:
    """What must be the same in two requests under one idempotency key: all that the client said.

    Nothing that the server fills in counts, such as settings that suit the model: it may have another version, or other
    defaults, when the request comes again.

    Args:
        pictures: names of uploads, which are hashes of what is in them.
    """
    said = [type(body).__name__, body.model_dump(mode="json", exclude_unset=True), *pictures]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def idempotency_key(connection: HTTPConnection) -> str | None:
    """The request's `Idempotency-Key`.

    Raises:
        Refused: it is longer than 200 letters, or has others than plain ones.
    """
    key = connection.headers.get("idempotency-key")
    if key is None or KEY.fullmatch(key):
        return key
    raise Refused("Idempotency-Key: use 1 to 200 letters, digits or signs.", param="Idempotency-Key")


def deadline_of(connection: HTTPConnection, default: float | None) -> float | None:
    """When the job must be done, in seconds since 1970; None for whenever.

    Raises:
        Refused: `X-Octavo-Timeout` is no number of seconds.
    """
    text = connection.headers.get("x-octavo-timeout")
    try:
        seconds = default if text is None else float(text)
    except ValueError:
        seconds = -1.0
    if seconds is not None and not 0 < seconds <= LONGEST_TIMEOUT:
        raise Refused(f"X-Octavo-Timeout '{text}': give seconds, more than 0.", param="X-Octavo-Timeout")
    return None if seconds is None else time.time() + seconds


def failure(stored: Stored) -> Refused:
    """Why a job is not done, as a refusal with the status of the error that it ended with."""
    if not stored.over:
        return Refused("The client left before the request was done.", status=499, kind="client_left")
    if stored.error is None:
        return Refused(f"The request is {stored.state}.", status=409, kind="cancelled")
    name, text = str(stored.error.get("type")), str(stored.error.get("message"))
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, OctavoError):
        status, word = status_of_type(kind)
        return Refused(text, status=status, kind=word)
    if name == "InternalError":
        return Refused(text, status=500, kind="internal_error")
    return Refused(text, status=422, kind="cannot_be_done")


async def _left(request: Request) -> None:
    """Return when the client has hung up."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
