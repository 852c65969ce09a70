"""Clients that do not read what they are sent: their connections are dropped, so that none is held for ever.

A reader may be as slow as it likes, as long as it takes something now and then. Without this, a client that stops
reading would keep its socket, its task and what waits to be sent for as long as its own machine runs: closing in good
order waits until everything has been taken.
"""

import asyncio
from typing import TYPE_CHECKING

from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

if TYPE_CHECKING:
    _Protocol = asyncio.Protocol
else:
    _Protocol = object

PATIENCE = 30.0  # seconds in which a reader must take something of what waits for it
PARTING = 5.0  # seconds that it has for the last of it


class Impatient(_Protocol):
    """Part of a protocol: drops the connection when much waits to be sent and nothing of it is taken."""

    loop: asyncio.AbstractEventLoop
    transport: asyncio.Transport
    _look: asyncio.TimerHandle | None = None

    def pause_writing(self) -> None:
        super().pause_writing()
        self._look_later()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._look_no_more()

    def connection_lost(self, exc: Exception | None) -> None:
        self._look_no_more()
        super().connection_lost(exc)

    def part(self) -> None:
        """The connection is being closed: do not wait long for a reader to take the rest."""
        self.loop.call_later(PARTING, self.transport.abort)

    def _look_later(self) -> None:
        self._look_no_more()
        self._look = self.loop.call_later(PATIENCE, self._look_now, self.transport.get_write_buffer_size())

    def _look_now(self, before: int) -> None:
        if self.transport.get_write_buffer_size() >= before:
            self.transport.abort()
        else:
            self._look_later()

    def _look_no_more(self) -> None:
        if self._look is not None:
            self._look.cancel()
            self._look = None


class Web(Impatient, H11Protocol):
    """uvicorn's HTTP/1.1."""

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self.part()


class Socket(Impatient, WebSocketsSansIOProtocol):
    """uvicorn's websockets. Who does not read is not heard either: its pings would all be answered into memory."""

    def pause_writing(self) -> None:
        super().pause_writing()
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.read_paused:
            self.transport.resume_reading()

    def keepalive_timeout(self) -> None:
        super().keepalive_timeout()
        self.part()
