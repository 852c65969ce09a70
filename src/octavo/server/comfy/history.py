"""Routes that tell what is over and what is to come: `/history`, `/jobs`."""

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse

from octavo.server.comfy.bodies import TEXTS, TRUTH, JsonObject, described, names_field, whole_number
from octavo.server.comfy.queue import KIND, is_callers, withdraw
from octavo.server.comfy.records import STATUSES, history_entry, job_summary, job_whole, workflow_id
from octavo.server.security import caller_of
from octavo.server.state import TheState

router = APIRouter(tags=["ComfyUI: prompts"])

SORTS = {"created_at": "created", "execution_duration": "seconds"}


@router.get("/history")
def get_history(state: TheState, max_items: str | None = None, offset: str | None = None) -> JSONResponse:
    """Prompts that are over, by id, the oldest first.

    Args:
        max_items: how many at most, the latest unless there is an `offset`.
        offset: how many of the oldest to pass over.
    """
    limit, start = whole_number(max_items, "max_items", least=0), whole_number(offset, "offset", least=-1)
    if start is None or start < 0:
        jobs = state.queue.history(KIND, limit)[::-1]
    else:
        jobs = state.queue.history(KIND, limit, start, newest_first=False)
    return JSONResponse({job.id: history_entry(job) for job in jobs})


@router.get("/history/{prompt_id}")
def get_history_of(prompt_id: str, state: TheState) -> JSONResponse:
    """One prompt that is over; an empty object where there is none."""
    job = state.queue.get(prompt_id)
    return JSONResponse({job.id: history_entry(job)} if job is not None and job.kind == KIND and job.over else {})


@router.post("/history", openapi_extra=described(clear=TRUTH, delete=TEXTS))
def post_history(request: Request, body: JsonObject, state: TheState) -> Response:
    """Forget prompts: those in `delete`, or, with `clear`, all that the caller has sent. Pictures stay."""
    ids = names_field(body, "delete")
    if body.get("clear") is True:
        state.queue.clear(KIND, client=caller_of(request).name)
    state.queue.delete([id for id in ids if is_callers(request, state.queue.get(id))])
    return Response()


@router.get("/jobs")
def get_jobs(
    state: TheState,
    status: Annotated[str, Query(description=f"some of {', '.join(STATUSES)}, separated by commas")] = "",
    workflow_id: str | None = None,
    sort_by: Annotated[str, Query(description=" or ".join(SORTS))] = "created_at",
    sort_order: Annotated[str, Query(description="asc or desc")] = "desc",
    limit: str | None = None,
    offset: str | None = None,
) -> JSONResponse:
    """Prompts in any state, a page at a time."""
    wanted = [word for word in (each.strip() for each in status.split(",")) if word] or list(STATUSES)
    unknown = [word for word in wanted if word not in STATUSES]
    if unknown:
        known = ", ".join(STATUSES)
        return _wrong(f"Invalid status value(s): {', '.join(unknown)[:200]}. Valid values: {known}")
    if sort_by not in SORTS:
        return _wrong(f"sort_by must be one of: {', '.join(SORTS)}")
    if sort_order not in ("asc", "desc"):
        return _wrong("sort_order must be 'asc' or 'desc'")
    most, start = whole_number(limit, "limit", least=1), whole_number(offset, "offset", least=0) or 0
    states: Any = [state for word in wanted for state in STATUSES[word]]
    order: Any = {"sort_by": SORTS[sort_by], "newest_first": sort_order == "desc"}
    if workflow_id is None:
        total = sum(n for each, n in state.queue.counts(KIND).items() if each in states)
        jobs = state.queue.jobs(states, kind=KIND, limit=most, offset=start, **order)
    else:
        found = [job for job in state.queue.jobs(states, kind=KIND, **order) if _of(job) == workflow_id]
        total, jobs = len(found), found[start : None if most is None else start + most]
    page = {"offset": start, "limit": most, "total": total, "has_more": start + len(jobs) < total}
    return JSONResponse({"jobs": [job_summary(job) for job in jobs], "pagination": page})


@router.get("/jobs/{job_id}")
def get_job(job_id: str, state: TheState) -> JSONResponse:
    """One prompt with all there is to say."""
    job = state.queue.get(job_id)
    if job is None or job.kind != KIND:
        return JSONResponse({"error": "Job not found"}, 404)
    return JSONResponse(job_whole(job))


@router.post("/jobs/cancel", openapi_extra=described(job_ids=TEXTS))
def cancel_jobs(request: Request, body: JsonObject, state: TheState) -> Response:
    """Take the prompts in `job_ids` back, whether they wait or run."""
    withdraw(request, state, names_field(body, "job_ids"))
    return Response()


@router.post("/jobs/{job_id}/cancel")
def cancel_job(request: Request, job_id: str, state: TheState) -> Response:
    """Take one prompt back, whether it waits or runs."""
    job = state.queue.get(job_id)
    if job is None or job.kind != KIND:
        return JSONResponse({"error": "Job not found"}, 404)
    withdraw(request, state, [job_id])
    return Response()


_of = workflow_id


def _wrong(text: str) -> JSONResponse:
    return JSONResponse({"error": text}, 400)
