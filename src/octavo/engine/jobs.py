"""What the queue is given and gives back: an order, and the job that it becomes."""

import hashlib
import json
import sqlite3
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

from octavo.errors import RequestError

State = Literal["queued", "running", "done", "failed", "cancelled", "set_aside"]
OVER: tuple[State, ...] = ("done", "failed", "cancelled", "set_aside")  # from these nothing leads on
LONGEST_NAME = 200  # characters of an id, a client's name, an idempotency key
LARGEST_PRIORITY = 1_000_000
LARGEST_PAYLOAD = 4 << 20  # bytes of JSON; a queue of a thousand must fit into memory
LARGEST_NUMBER = 1e15  # so that neighbours stay apart as floats


class Options(TypedDict, total=False):
    """What may be said about a request beside its kind and payload; see `Order`."""

    id: str | None
    client: str
    api: str
    priority: int
    number: float | None
    front: bool
    deadline: float | None
    idempotency_key: str | None
    fingerprint: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """A request for the queue, checked.

    Raises:
        RequestError: a name is empty or too long, a number is none, or the payload is not JSON.
    """

    kind: str  # which runner does it
    payload: Mapping[str, Any]  # plain JSON
    id: str | None = None  # made up when not given
    client: str = ""  # who asks: the name of an API key; the share of the workers is per client
    api: str = "octavo"  # the door it came through, for the metrics
    priority: int = 0  # higher goes first, whoever asks
    number: float | None = None  # place among the client's own, smaller first; counts up when not given
    front: bool = False  # before all others of this client; does nothing when `number` is given
    deadline: float | None = None  # seconds since 1970; what is not finished by then has failed
    idempotency_key: str | None = None  # the same client and key again: the same job, not a new one
    fingerprint: str | None = None  # what must be equal under one key; None: kind and payload
    text: str = field(init=False, default="")  # the payload as it is stored

    def __post_init__(self) -> None:
        object.__setattr__(self, "id", uuid.uuid4().hex if self.id is None else self.id)
        for name in ("kind", "id", "client", "api", "idempotency_key", "fingerprint"):
            _check_name(name, getattr(self, name))
        if not isinstance(self.priority, int) or abs(self.priority) > LARGEST_PRIORITY:
            raise RequestError(f"priority {self.priority!r}: need a whole number within ±{LARGEST_PRIORITY}.")
        for name in ("number", "deadline"):
            given = getattr(self, name)
            # The comparison also refuses whole numbers too large for a float, and NaN.
            if given is not None and not (isinstance(given, int | float) and abs(given) < LARGEST_NUMBER):
                raise RequestError(f"{name} {given!r:.60}: need a number within ±{LARGEST_NUMBER:g}.")
        object.__setattr__(self, "text", to_json(self.payload, "The request"))
        if len(self.text) > LARGEST_PAYLOAD:
            raise RequestError(
                f"The request is {len(self.text) >> 20} MB of JSON, of which {LARGEST_PAYLOAD >> 20} are taken at "
                "most. Send pictures as files."
            )

    @property
    def compared(self) -> str:
        """What tells whether two requests under one idempotency key are the same."""
        if self.fingerprint is not None:
            return self.fingerprint
        text = json.dumps([self.kind, self.payload], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """A request as the queue holds it. Times are seconds since 1970."""

    seq: int  # the age: one more with every request ever accepted
    id: str
    kind: str
    payload: dict[str, Any]
    client: str
    api: str
    state: State
    priority: int
    number: float
    created: float
    started: float | None  # of the latest attempt
    finished: float | None
    deadline: float | None
    attempts: int  # how many processes died while it ran; a stop in good order does not count
    result: dict[str, Any] | None  # what the runner gave; of a failed one what it had by then, if it says
    error: dict[str, Any] | None  # {"type", "message", "details"} of a failed one or one set aside
    cancelling: bool  # running still, and asked to stop

    @property
    def over(self) -> bool:
        """Nothing will change any more."""
        return self.state in OVER

    @property
    def seconds(self) -> float | None:
        """How long it ran; None where it did not run or has not ended."""
        return None if self.started is None or self.finished is None else max(0.0, self.finished - self.started)

    @classmethod
    def of(cls, row: sqlite3.Row) -> "Stored":
        """From a row of the table `jobs`."""
        return cls(
            **{
                name: row[name]
                for name in (
                    *("seq", "id", "kind", "client", "api", "state", "priority", "number"),
                    *("created", "started", "finished", "deadline", "attempts"),
                )
            },
            payload=json.loads(row["payload"]),
            result=None if row["result"] is None else json.loads(row["result"]),
            error=None if row["error"] is None else json.loads(row["error"]),
            cancelling=bool(row["cancelling"]),
        )


def to_json(value: Mapping[str, Any], what: str) -> str:
    """JSON as any reader takes it: no NaN, no infinity.

    Raises:
        RequestError: `value` is not plain data.
    """
    try:
        return json.dumps(value, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"{what} cannot be stored as JSON: {error}.") from error


def _check_name(name: str, given: str | None) -> None:
    if given is None or (given == "" and name == "client"):
        return
    if not isinstance(given, str) or not 0 < len(given) <= LONGEST_NAME or not given.isprintable():
        raise RequestError(f"{name} {given!r:.60}: need 1 to {LONGEST_NAME} printable characters.")
