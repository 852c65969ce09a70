"""ComfyUI's websocket: who is connected, what each one is told, in ComfyUI's order, and how slow ones are borne.

A page connects with a `clientId` of its own and posts prompts under it; what happens to a prompt is told to that client
alone, the length of the queue to everybody. The engine's events come in through `Clients.hear`, in the event loop. Each
connection has an `Outbox`: a reader that does not keep up loses previews first and progress next, and is let go when
even the rest piles up, so that nothing here ever waits for it.
"""

import asyncio
import json
import uuid
from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, WebSocket, WebSocketDisconnect

from octavo.server.comfy import previews

if TYPE_CHECKING:
    from octavo.engine.service import Event

router = APIRouter()

MOST_PREVIEWS = 4  # waiting in one outbox
MOST_PASSING = 128  # messages waiting; beyond that, progress is left out
MOST = 1024  # messages waiting; beyond that, the reader is let go
SEND_PATIENCE = 60.0  # seconds that a reader may take over one message
LONGEST_ID = 200  # letters of a clientId
BAD_REQUEST, TOO_SLOW = 1008, 1013  # codes that connections are closed with
PASSING = frozenset({"progress", "progress_state", "status", "logs"})
ENDINGS = frozenset({"execution_success", "execution_error", "execution_interrupted"})
OVER = frozenset({"finished", "failed", "cancelled"})
ASK_FOR_PREVIEWS = frozenset({"auto", "latent2rgb", "taesd"})  # ComfyUI's `preview_method`s that are not "none"


class Worth(IntEnum):
    """Which messages leave first when too many wait."""

    PREVIEW = 0
    PASSING = 1
    LASTING = 2


class Outbox:
    """Messages that wait to be sent to one reader, in order and bounded."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[Worth, str | bytes]] = deque()
        self._arrived = asyncio.Event()
        self.overflowed = False

    def put(self, message: str | bytes, worth: Worth) -> None:
        """Keep a message; where too many wait, the oldest of the least worth leaves."""
        if self.overflowed:
            return  # the reader is let go
        self._waiting.append((worth, message))
        if worth is Worth.PREVIEW and self._count(Worth.PREVIEW) > MOST_PREVIEWS:
            self._drop(Worth.PREVIEW)
        if len(self._waiting) > MOST_PASSING and not self._drop(Worth.PREVIEW):
            self._drop(Worth.PASSING)
        self.overflowed = self.overflowed or len(self._waiting) > MOST
        self._arrived.set()

    async def next(self) -> str | bytes:
        """The next message, once there is one."""
        while not self._waiting:
            self._arrived.clear()
            await self._arrived.wait()
        return self._waiting.popleft()[1]

    def _count(self, worth: Worth) -> int:
        return sum(each is worth for each, _ in self._waiting)

    def _drop(self, worth: Worth) -> bool:
        for place, (each, _) in enumerate(self._waiting):
            if each is worth:
                del self._waiting[place]
                return True
        return False


@dataclass(eq=False)
class Reader:
    """One connection."""

    client: str
    outbox: Outbox = field(default_factory=Outbox)
    knows_metadata: bool = False  # said so by its feature flags: previews come as event 4
    held: tuple[bytes, Worth] | None = None  # a preview that goes out after the progress it belongs to


@dataclass
class Prompt:
    """A prompt that waits or runs."""

    client: str | None  # whom its messages go to
    wants_previews: bool = False  # it named a preview method
    executing: str | None = None  # the latest messages of these types, for readers that come back
    progress: str | None = None
    ending: str | None = None  # how it ended, held back until the history says so, too


class Clients:
    """Everybody who listens, and every prompt that is not over. All methods but `see` belong to the event loop.

    Args:
        features: what the server says of itself in `feature_flags`.
        previews: "auto" sends previews to pages that say they know them and for prompts that name a preview method;
            "all" sends them to everybody, as ComfyUI does under `--preview-method`.
    """

    def __init__(self, features: Mapping[str, Any], *, previews: str = "auto") -> None:
        self.features = features
        self.previews = previews
        self.log_readers: set[str] = set()  # clients that want the log's lines
        self.stop_logs: Callable[[], None] | None = None  # ends the sending of them
        self._readers: set[Reader] = set()
        self._prompts: dict[str, Prompt] = {}

    @property
    def remaining(self) -> int:
        """Prompts that wait or run."""
        return len(self._prompts)

    def __contains__(self, id: str) -> bool:
        """Whether the prompt waits or runs."""
        return id in self._prompts

    def expect(self, id: str, client: str | None, extra_data: Mapping[str, Any]) -> None:
        """A prompt is about to enter the queue, or was in it when the server started."""
        self._prompts[id] = Prompt(client, extra_data.get("preview_method") in ASK_FOR_PREVIEWS)

    def see(self, id: str) -> bool:
        """Whether previews of this prompt would be sent to anybody; any thread may ask."""
        prompt = self._prompts.get(id)
        if prompt is None:
            return False
        asked = prompt.wants_previews or self.previews == "all"
        # A copy made in one piece: the loop changes the set meanwhile.
        return any(
            reader.client == prompt.client and (asked or reader.knows_metadata) for reader in tuple(self._readers)
        )

    def forget(self, id: str) -> None:
        """It did not enter the queue after all."""
        self._prompts.pop(id, None)

    # What happens

    def hear(self, event: "Event") -> None:
        """Tell those concerned of an event of the engine."""
        prompt = self._prompts.get(event.job)
        if prompt is None:
            return  # another API's job
        if event.type == "comfy":
            self._pass_on(prompt, event.data["type"], event.data["data"])
        elif event.type == "preview" and event.binary is not None:
            self._show(prompt, event.binary, {"prompt_id": event.job, **event.data})
        elif event.type in ("queued", "started"):
            self.broadcast("status", {"status": self.status})
        elif event.type == "requeued":
            prompt.executing = prompt.progress = prompt.ending = None
        elif event.type in OVER:
            del self._prompts[event.job]
            if prompt.ending is not None:
                self._tell(prompt.client, prompt.ending)
            self.broadcast("status", {"status": self.status})
            if prompt.executing is not None:
                self._tell(prompt.client, _message("executing", {"node": None, "prompt_id": event.job}))

    def broadcast(self, type: str, data: Mapping[str, Any], readers: Collection[str] | None = None) -> None:
        """A message to everybody, or to some clients."""
        text = _message(type, data)
        for reader in self._readers:
            if readers is None or reader.client in readers:
                reader.outbox.put(text, _worth(type))

    def _pass_on(self, prompt: Prompt, type: str, data: Mapping[str, Any]) -> None:
        """ComfyUI's own messages, as the graph's runner makes them."""
        text = _message(type, data)
        if type == "executing":
            prompt.executing = text
        elif type == "progress_state":
            prompt.progress = text
        elif type == "execution_start":
            prompt.executing = ""
        elif type in ENDINGS:
            # A client that now asks for the history must find the prompt there.
            prompt.ending = text
            return
        self._tell(prompt.client, text, _worth(type))
        if type == "progress":
            for reader in self._of(prompt.client):
                if reader.held is not None:
                    reader.outbox.put(*reader.held)
                    reader.held = None

    def _show(self, prompt: Prompt, picture: bytes, of: Mapping[str, Any]) -> None:
        """A preview. As ComfyUI does, before the step's `progress` with metadata, after it without."""
        result = of.get("image_type") == "image/png"  # of a node that saves to the websocket
        for reader in self._of(prompt.client):
            if reader.knows_metadata:
                reader.outbox.put(previews.with_metadata(picture, of), Worth.LASTING if result else Worth.PREVIEW)
            elif result or prompt.wants_previews or self.previews == "all":
                # A plain program may take every picture on its socket for a result, so it must have asked.
                reader.held = previews.plain(picture), Worth.LASTING if result else Worth.PREVIEW

    def _tell(self, client: str | None, text: str, worth: Worth = Worth.LASTING) -> None:
        for reader in self._of(client):
            reader.outbox.put(text, worth)

    def _of(self, client: str | None) -> list[Reader]:
        return [reader for reader in self._readers if client is not None and reader.client == client]

    @property
    def status(self) -> dict[str, Any]:
        """How much is left to do, as ComfyUI says it."""
        return {"exec_info": {"queue_remaining": self.remaining}}

    # Who comes and goes

    def join(self, client: str) -> Reader:
        """A connection; it is told where things stand. Several may share an id: a page copied to another tab does."""
        reader = Reader(client)
        reader.outbox.put(_message("status", {"status": self.status, "sid": client}), Worth.LASTING)
        for prompt in self._prompts.values():
            if prompt.client == client:
                for text in (prompt.progress, prompt.executing):
                    if text:
                        reader.outbox.put(text, Worth.LASTING)
        self._readers.add(reader)
        return reader

    def has(self, client: str) -> bool:
        """Whether a client of that id is connected."""
        return bool(self._of(client))

    def leave(self, reader: Reader) -> None:
        """A connection has ended."""
        self._readers.discard(reader)
        if not self._of(reader.client):
            self.log_readers.discard(reader.client)
        if not self.log_readers and self.stop_logs is not None:
            self.stop_logs()
            self.stop_logs = None

    def receive(self, reader: Reader, text: str) -> None:
        """What a client says: its feature flags. Anything else is passed over, as ComfyUI does."""
        try:
            message = json.loads(text)
        except (ValueError, RecursionError):
            return
        if isinstance(message, dict) and message.get("type") == "feature_flags":
            flags = message.get("data")
            reader.knows_metadata = isinstance(flags, dict) and flags.get("supports_preview_metadata") is True
            reader.outbox.put(_message("feature_flags", self.features), Worth.LASTING)


@router.websocket("/ws")
async def socket(websocket: WebSocket) -> None:
    """Messages about prompts, as they happen."""
    clients: Clients = websocket.app.state.comfy.clients
    client = websocket.query_params.get("clientId") or uuid.uuid4().hex
    if len(client) > LONGEST_ID or not client.isprintable():
        await websocket.close(BAD_REQUEST, f"A clientId has up to {LONGEST_ID} printable letters.")
        return
    await websocket.accept()
    reader = clients.join(client)
    both = [asyncio.create_task(_send(websocket, reader)), asyncio.create_task(_listen(websocket, clients, reader))]
    try:
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
    finally:
        clients.leave(reader)
        for task in both:
            task.cancel()
        await asyncio.wait(both)
    for task in both:
        if not task.cancelled():
            task.result()  # a fault of ours goes on to the log


async def _send(websocket: WebSocket, reader: Reader) -> None:
    """Send what waits, until the reader leaves or is too slow."""
    while True:
        message = await reader.outbox.next()
        try:
            async with asyncio.timeout(SEND_PATIENCE):
                await (websocket.send_text(message) if isinstance(message, str) else websocket.send_bytes(message))
        except (WebSocketDisconnect, RuntimeError):
            return  # it has left
        except TimeoutError:
            reader.outbox.overflowed = True
        if reader.outbox.overflowed:
            # Its page connects again, and asks for the state of things.
            await websocket.close(TOO_SLOW, "You are too slow; connect again.")
            return


async def _listen(websocket: WebSocket, clients: Clients, reader: Reader) -> None:
    """Hear what the client says, until it leaves."""
    while True:
        message = await websocket.receive()
        if message["type"] == "websocket.disconnect":
            return
        if message.get("text"):
            clients.receive(reader, message["text"])


def _worth(type: str) -> Worth:
    return Worth.PASSING if type in PASSING else Worth.LASTING


def _message(type: str, data: Mapping[str, Any]) -> str:
    return json.dumps({"type": type, "data": data})
