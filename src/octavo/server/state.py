"""What one server holds: its settings, its queue, and, once they are there, its models.

A server answers before torch is imported. `State.start` begins that in a thread of its own, and two promises are kept
along the way: `until_started` (torch and the rooms that need it are imported; requests can be checked and accepted) and
`until_ready` (the model is in memory). What cannot be loaded ends up in `problem`.
"""

import asyncio
import logging
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Depends
from starlette.requests import HTTPConnection

from octavo.engine.events import Event
from octavo.engine.metrics import Metrics
from octavo.engine.queue import Queue
from octavo.engine.service import Service
from octavo.errors import OctavoError, RequestError
from octavo.server.hub import Hub
from octavo.server.keys import Keys
from octavo.server.links import Links
from octavo.server.pictures import forget_uploads
from octavo.server.places import Places
from octavo.server.problems import Refused
from octavo.server.settings import Settings

if TYPE_CHECKING:
    from octavo.engine.batch import Batcher
    from octavo.engine.service import Runner, Task
    from octavo.graph.runner import Workshop
    from octavo.pipeline.shelf import Shelf

logger = logging.getLogger(__name__)

PATIENCE = 60.0  # seconds that a request waits for the imports
GLANCE = 15.0  # seconds for which previews are made after A1111's progress was asked for
TIDYING = 3600.0  # seconds between looks at what is not needed any more
STOPPING = 10.0  # seconds that work under way has to end when the server stops


@dataclass(frozen=True, kw_only=True)
class Works:
    """All that needs torch."""

    shelf: "Shelf"
    batcher: "Batcher | None"
    nodes: Mapping[str, Any]  # ComfyUI's nodes by name
    workshop: "Workshop | None"  # what workflows share, their cache among it
    runners: "Mapping[str, Runner]"  # by kind of job
    warm_up: Callable[[], None]  # brings the model into memory
    close: Callable[[], None]


Load = Callable[["State"], Works]


class State:
    """One server. `create_app` makes it, `the_state` gives it to a route.

    Attributes:
        settings: as the server was started with.
        queue: every request that was accepted, on disk.
        service: who runs them.
        events: what happens to them, for readers in the event loop.
        metrics: what is counted.
        keys: who may come in.
        stage: what the server is doing on its way to being ready, for people.
        problem: why it never will be, or None.
        viewers: each says, in any thread, whether its clients see previews of a job.
        glanced: when A1111's progress was last asked for, by `time.monotonic`.
        leaving: set when the server begins to stop.
        a1111: options that A1111's clients have set, by caller.
        links: addresses of pictures that open without a key.
        places: cuts the paths of this machine out of what clients are told.
    """

    def __init__(self, settings: Settings, *, load: Load | None = None) -> None:
        self.settings = settings
        self.metrics = Metrics()
        # First of all: it refuses where another server has the folder.
        self.queue = Queue(settings.queue_file, limit=settings.queue_limit)
        try:
            _make_folders(settings)
            self.keys = Keys(settings.keys_file, settings.api_keys)
        except RequestError:
            self.queue.close()
            raise
        self.events = Hub()
        self.service = Service(
            self.queue,
            {kind: self._runner(kind) for kind in ("generate", "graph")},
            workers=settings.workers,
            metrics=self.metrics,
        )
        self.places = Places(settings)
        self.service.subscribe(self._publish)
        self.a1111: dict[str, dict[str, Any]] = {}
        self.links = Links()
        self.viewers: list[Callable[[str], bool]] = []
        self.glanced = float("-inf")
        self.stage = "starting"
        self.problem: OctavoError | None = None
        self.failed: Callable[[], None] = lambda: None  # called in the loop when `problem` is set
        self._load = load or load_works
        self._works: Works | None = None
        self.leaving = asyncio.Event()
        self._started, self._ready = asyncio.Event(), asyncio.Event()
        self._turn = threading.Lock()  # whoever brings the server up or down
        self._stopping = False
        self._left = threading.Event()

    # What needs torch

    @property
    def works(self) -> Works:
        """What needs torch. Raises `Refused` (503) where it is not there yet; see `until_started`."""
        if self._works is None:
            raise self._not_yet()
        return self._works

    @property
    def shelf(self) -> "Shelf":
        """The models."""
        return self.works.shelf

    @property
    def nodes(self) -> Mapping[str, Any]:
        """ComfyUI's nodes by name."""
        return self.works.nodes

    @property
    def is_started(self) -> bool:
        return self._works is not None

    @property
    def is_ready(self) -> bool:
        return self._ready.is_set() and self.problem is None

    def watched(self, job: str) -> bool:
        """Whether previews of a job are worth making; any thread may ask."""
        return (
            self.events.watched(job)
            or time.monotonic() - self.glanced < GLANCE
            or any(views(job) for views in self.viewers)
        )

    async def until_started(self) -> Works:
        """Wait until requests can be checked and accepted.

        Raises:
            Refused: 503; it takes too long, or never will be.
        """
        if self._works is None:
            await self._wait(self._started)
        return self.works

    async def until_ready(self) -> Works:
        """Wait until the model is in memory. Raises as `until_started`."""
        await self._wait(self._ready)
        return self.works

    async def _wait(self, event: asyncio.Event) -> None:
        try:
            await asyncio.wait_for(event.wait(), PATIENCE)
        except TimeoutError:
            raise self._not_yet() from None
        if self.problem is not None:
            raise self._not_yet()

    def _not_yet(self) -> Refused:
        if self.problem is not None:
            return Refused(f"The server cannot work: {self.problem}", status=503, kind="unavailable")
        text = f"The server is not ready yet ({self.stage}); try again in a moment."
        return Refused(text, status=503, kind="unavailable", headers={"Retry-After": "2"})

    # Its life

    def start(self) -> None:
        """Begin to load, in a thread; call this in the event loop."""
        self.events.open()
        self._loop = asyncio.get_running_loop()
        threading.Thread(target=self._bring_up, name="octavo-load", daemon=True).start()

    def _bring_up(self) -> None:
        try:
            self.stage = "importing torch"
            works = self._load(self)
            with self._turn:
                if self._stopping:
                    works.close()
                    return
                self._works = works
                self.service.start()
            self._tell(self._started)
            self.stage = "loading the model"
            works.warm_up()
            self.stage = "ready"
            logger.info("ready")
        except OctavoError as problem:
            self._give_up(problem)
        except Exception as fault:
            if not self._stopping:
                logger.exception("The server cannot start")
            self._give_up(OctavoError(f"{type(fault).__name__}: {fault}"))
        self._tell(self._started)
        self._tell(self._ready)
        self._tidy()

    def _tidy(self) -> None:
        """Now and then, delete uploads that no job needs any more; until the server stops."""
        while self.problem is None:
            try:
                jobs = [*self.queue.pending(), *self.queue.running()]
                forget_uploads(self.settings.uploads, [job.payload for job in jobs])
            except (OSError, OctavoError) as error:
                if not self._stopping:
                    logger.warning("Uploads cannot be tidied: %s", error)
            if self._left.wait(TIDYING):
                return

    def _give_up(self, problem: OctavoError) -> None:
        if self._stopping:
            # Whatever was under way has lost its ground; that is no failure.
            return
        self.stage, self.problem = "failed", problem
        self._call(lambda: self.failed())

    def _tell(self, event: asyncio.Event) -> None:
        self._call(event.set)

    def _call(self, what: Callable[[], object]) -> None:
        try:
            self._loop.call_soon_threadsafe(what)
        except RuntimeError:
            # The loop has been closed: the server was stopped before it was up.
            return

    async def stop(self) -> None:
        """Let work under way end, within bounds; what is not done is taken up at the next start."""
        self.events.close()
        await asyncio.to_thread(self._shut_down)

    def _shut_down(self) -> None:
        with self._turn:
            self._stopping = True
        self._left.set()
        self.service.stop(STOPPING)
        if self._works is not None:
            self._works.close()
        self.queue.close()

    def _runner(self, kind: str) -> "Runner":
        def run(task: "Task") -> Mapping[str, Any]:
            try:
                return self.works.runners[kind](task)
            except OctavoError as error:
                # What is stored of it is for the client; the log has all of it.
                logger.info("Request %s: %s", task.job.id, error, extra={"job": task.job.id})
                self.places.clean(error)
                raise

        return run

    def _publish(self, event: Event) -> None:
        """Hand an event on; a failed node's text names files, too."""
        if event.type == "execution_error":
            event = replace(event, data=self.places.within(event.data))
        self.events.publish(event)


def _make_folders(settings: Settings) -> None:
    try:
        for folder in (settings.output_dir, settings.inputs, settings.uploads, settings.user_dir):
            folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(settings.temp_dir, ignore_errors=True)
        settings.temp_dir.mkdir(exist_ok=True)
    except OSError as error:
        raise RequestError(
            f"The folder {error.filename} cannot be made: {error.strerror}. Choose another --data-dir, --output-dir or "
            "--input-dir."
        ) from error


def load_works(state: State) -> Works:
    """Import torch and all that needs it, and look at the model's header.

    Raises:
        OctavoError: no such model or device, a file that cannot be used.
    """
    from octavo.server import works

    return works.load(state)


def the_state(connection: HTTPConnection) -> State:
    """For `Depends`: the state, in routes and websockets alike."""
    state = connection.app.state.octavo
    assert isinstance(state, State)
    return state


TheState = Annotated[State, Depends(the_state)]
