"""Routes that put prompts into the queue and take them back: `/prompt`, `/queue`, `/interrupt`, `/free`.

Everybody sees the whole queue, as in ComfyUI; with API keys, each takes back only what came with its own.
"""

import hashlib
import json
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse

from octavo.errors import QueueFullError, RequestError
from octavo.graph.workflow import InvalidPrompt, Workflow, validate
from octavo.server.comfy.bodies import (
    NUMBER,
    OBJECT,
    TEXT,
    TEXTS,
    TRUTH,
    JsonObject,
    described,
    names_field,
    text_field,
)
from octavo.server.comfy.lists import lists_of
from octavo.server.comfy.records import number, queue_item
from octavo.server.comfy.socket import Clients
from octavo.server.jobs import deadline_of, idempotency_key
from octavo.server.security import caller_of
from octavo.server.state import State, TheState

if TYPE_CHECKING:
    from octavo.engine.jobs import Stored

router = APIRouter(tags=["ComfyUI: prompts"])

KIND = "graph"  # of our jobs
API = "comfyui"
# What the page sends along for nodes that call paid services; we have none, and it is nobody's business.
SECRETS = frozenset({"auth_token_comfy_org", "api_key_comfy_org"})


@router.get("/prompt")
def get_prompt(request: Request) -> dict[str, Any]:
    """How much is left to do."""
    return _clients(request).status


@router.post(
    "/prompt",
    openapi_extra=described(
        ["prompt"],
        prompt=OBJECT,
        client_id=TEXT,
        prompt_id=TEXT,
        extra_data=OBJECT,
        front=TRUTH,
        number=NUMBER,
        partial_execution_targets=TEXTS,
    ),
)
async def post_prompt(request: Request, body: JsonObject, state: TheState) -> JSONResponse:
    """Queue a workflow in the API format.

    Fields: `prompt`, the nodes by id; `client_id`, whose websocket is told of it; `extra_data`, with
    `extra_pnginfo.workflow` for the picture; `prompt_id`; `front` or `number`, its place in the queue;
    `partial_execution_targets`, the output nodes to run.

    An `Idempotency-Key` in the header makes the same request sent twice one prompt.
    """
    if "prompt" not in body:
        return _wrong("no_prompt", "No prompt provided", "No prompt provided")
    client = text_field(body, "client_id")
    id = text_field(body, "prompt_id") or str(uuid.uuid4())
    extra_data = _extra_data(body, client)
    targets = body.get("partial_execution_targets")
    place = _place(body)
    works = await state.until_started()
    try:
        workflow = await run_in_threadpool(validate, body["prompt"], works.nodes, lists_of(state), targets=targets)
    except InvalidPrompt as wrong:
        state.metrics.request(API, "refused")
        return JSONResponse({"error": wrong.error, "node_errors": wrong.node_errors}, 400)
    clients = _clients(request)
    new = id not in clients
    if new:
        clients.expect(id, client, extra_data)
    elif idempotency_key(request) is None:
        return _wrong("prompt_id_taken", f"There is a prompt '{id[:100]}' in the queue already", "use a new prompt_id")
    try:
        job = await run_in_threadpool(
            _submit, request, state, id, _payload(workflow, extra_data, client, targets), place
        )
    except BaseException as error:
        if new:
            clients.forget(id)
        if isinstance(error, QueueFullError):
            headers = {"Retry-After": str(max(1, round(getattr(error, "retry_after", 1))))}
            return _wrong("queue_full", str(error), "", status=429, headers=headers)
        if isinstance(error, RequestError):
            return _wrong("invalid_request", str(error), "")
        raise
    if new and (job.id != id or job.over):
        clients.forget(id)  # it came before, with the same idempotency key
    return JSONResponse({"prompt_id": job.id, "number": number(job), "node_errors": dict(workflow.node_errors)})


@router.get("/queue")
def get_queue(state: TheState) -> JSONResponse:
    """What runs, and what waits, in the order in which it will run."""
    running, waiting = state.queue.running(KIND), state.queue.pending(KIND)
    return JSONResponse(
        {"queue_running": [queue_item(job) for job in running], "queue_pending": [queue_item(job) for job in waiting]}
    )


@router.post("/queue", openapi_extra=described(clear=TRUTH, delete=TEXTS))
def post_queue(request: Request, body: JsonObject, state: TheState) -> Response:
    """Take back what waits: the prompts in `delete`, or, with `clear`, all that the caller has sent."""
    ids = [
        id for id in names_field(body, "delete") if (job := state.queue.get(id)) is not None and job.state == "queued"
    ]
    if body.get("clear") is True:
        waiting = state.service.cancel_queued(kind=KIND, client=caller_of(request).name)
        state.queue.delete([job.id for job in waiting])
    withdraw(request, state, ids)
    return Response()


@router.post("/interrupt", openapi_extra=described(prompt_id=TEXT))
def interrupt(request: Request, body: JsonObject, state: TheState) -> Response:
    """Stop the prompt `prompt_id` if it runs, or, without one, all that the caller has running."""
    id = text_field(body, "prompt_id")
    withdraw(request, state, [job.id for job in state.queue.running(KIND) if id in (None, "", job.id)])
    return Response()


@router.post("/free", openapi_extra=described(unload_models=TRUTH, free_memory=TRUTH))
async def free(body: JsonObject, state: TheState) -> Response:
    """Let go of models (`unload_models`), and of what is kept between runs (`free_memory`)."""
    if body.get("unload_models") is True or body.get("free_memory") is True:
        works = await state.until_started()
        batcher, shelf = works.batcher, works.shelf
        if body.get("free_memory") is True and works.workshop is not None:
            works.workshop.cache.clear()
        await run_in_threadpool(shelf.free if batcher is None else lambda: batcher.do(shelf.free))
    return Response()


def withdraw(request: Request, state: State, ids: Iterable[str]) -> None:
    """Cancel prompts of the caller; those that had not begun leave no trace in the history, as in ComfyUI."""
    for id in ids:
        if is_callers(request, job := state.queue.get(id)) and state.service.cancel(id):
            after = state.queue.get(id)
            if job is not None and after is not None and after.state == "cancelled" and after.started is None:
                state.queue.delete([id])


def is_callers(request: Request, job: "Stored | None") -> bool:
    """Whether it is a prompt, and came from whoever sends this request."""
    return job is not None and job.kind == KIND and job.client == caller_of(request).name


def _submit(request: Request, state: State, id: str, payload: dict[str, Any], place: Mapping[str, Any]) -> "Stored":
    caller = caller_of(request)
    return state.service.submit(
        KIND,
        payload,
        id=id,
        client=caller.name,
        api=API,
        priority=caller.priority,
        deadline=deadline_of(request, state.settings.job_timeout),
        idempotency_key=idempotency_key(request),
        fingerprint=_fingerprint(payload),
        **place,
    )


def _payload(
    workflow: Workflow, extra_data: dict[str, Any], client: str | None, targets: Sequence[str] | None
) -> dict[str, Any]:
    """What the runner of graphs is given, and what the history shows."""
    return {
        "prompt": workflow.prompt,
        "extra_data": extra_data,
        "client_id": client,
        "targets": targets,
        "outputs": list(workflow.outputs),
    }


def _fingerprint(payload: dict[str, Any]) -> str:
    """What two requests under one `Idempotency-Key` must have in common: all but the time they came at."""
    extra_data = {key: value for key, value in payload["extra_data"].items() if key != "create_time"}
    text = json.dumps([payload["prompt"], payload["targets"], extra_data], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _extra_data(body: dict[str, Any], client: str | None) -> dict[str, Any]:
    given = body.get("extra_data")
    if given is not None and not isinstance(given, dict):
        raise RequestError("'extra_data' should be an object.")
    kept = {key: value for key, value in (given or {}).items() if key not in SECRETS}
    return kept | ({"client_id": client} if client is not None else {}) | {"create_time": int(time.time() * 1000)}


def _place(body: dict[str, Any]) -> dict[str, Any]:
    """Where in the queue it goes."""
    at = body.get("number")
    if at is None:
        return {"front": body.get("front") is True}
    if isinstance(at, bool) or not isinstance(at, int | float):
        raise RequestError("'number' should be a number: prompts with smaller ones run first.")
    return {"number": at}


def _clients(request: Request) -> Clients:
    clients: Clients = request.app.state.comfy.clients
    return clients


def _wrong(
    type: str, message: str, details: str, *, status: int = 400, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """A refusal in ComfyUI's shape."""
    error = {"type": type, "message": message, "details": details, "extra_info": {}}
    return JSONResponse({"error": error, "node_errors": {}}, status, dict(headers or {}))
