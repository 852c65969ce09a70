"""Jobs of the queue as ComfyUI tells of them: its queue's items, its history's entries, its jobs.

A graph job's payload holds `prompt`, `extra_data`, `client_id`, `targets` and `outputs` (the output nodes it is run
for); its result is the entry of ComfyUI's history: `outputs`, `meta`, `status`. A job that ended before its runner
could say anything has none, and gets one here.
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from octavo.engine.jobs import Stored

Json = dict[str, Any]

STATUSES: Mapping[str, tuple[str, ...]] = {
    "pending": ("queued",), "in_progress": ("running",), "completed": ("done",), "failed": ("failed", "set_aside"),
    "cancelled": ("cancelled",),
}  # fmt: skip
STATUS_OF: Mapping[str, str] = {state: status for status, states in STATUSES.items() for state in states}


def queue_item(job: "Stored") -> list[Any]:
    """`[number, id, prompt, extra_data, outputs]`, as the queue and the history hold a prompt."""
    payload = job.payload
    return [number(job), job.id, payload["prompt"], payload.get("extra_data", {}), payload.get("outputs", [])]


def history_entry(job: "Stored") -> Json:
    """One entry of the history."""
    result = job.result or {}
    return {
        "prompt": queue_item(job),
        "outputs": result.get("outputs", {}),
        "status": result.get("status") or _status(job),
        "meta": result.get("meta", {}),
    }


def job_summary(job: "Stored") -> Json:
    """One job, as the list of jobs shows it; what is not known is left out."""
    shown: Json = {
        "id": job.id,
        "status": STATUS_OF[job.state],
        "priority": number(job),
        "create_time": job.payload.get("extra_data", {}).get("create_time", milliseconds(job.created)),
    }
    outputs: Json = {}
    if job.over:
        entry = history_entry(job)
        outputs = entry["outputs"]
        shown["execution_start_time"] = milliseconds(job.started)
        shown["execution_end_time"] = milliseconds(job.finished)
        shown["execution_error"] = _error(entry["status"])
    shown["outputs_count"] = sum(1 for _ in _files(outputs))
    shown["preview_output"] = _preview(outputs)
    shown["workflow_id"] = workflow_id(job)
    return {key: value for key, value in shown.items() if value is not None}


def job_whole(job: "Stored") -> Json:
    """One job with all there is to say."""
    entry = history_entry(job)
    return {
        **job_summary(job),
        **({"outputs": entry["outputs"], "execution_status": entry["status"]} if job.over else {}),
        "workflow": {"prompt": job.payload["prompt"], "extra_data": job.payload.get("extra_data", {})},
    }


def number(job: "Stored") -> int | float:
    """Its place in the queue: smaller ones go first."""
    return int(job.number) if job.number.is_integer() else job.number


def workflow_id(job: "Stored") -> str | None:
    """The id that the page gave its workflow, if it did."""
    found: Any = job.payload.get("extra_data", {})
    for key in ("extra_pnginfo", "workflow", "id"):
        found = found.get(key) if isinstance(found, dict) else None
    return found if isinstance(found, str) else None


def milliseconds(seconds: float | None) -> int | None:
    """Seconds since 1970 as JavaScript counts."""
    return None if seconds is None else int(seconds * 1000)


def _status(job: "Stored") -> Json:
    """The status of a job whose runner left none."""
    if not job.over:
        return {"status_str": "success", "completed": False, "messages": []}
    about: Json = {"prompt_id": job.id, "timestamp": milliseconds(job.finished)}
    if job.state == "done":
        return {"status_str": "success", "completed": True, "messages": [["execution_success", about]]}
    about |= {"node_id": "", "node_type": "", "executed": []}
    if job.state == "cancelled":
        return {"status_str": "error", "completed": False, "messages": [["execution_interrupted", about]]}
    error = job.error or {}
    about |= {
        "exception_message": str(error.get("message", "")),
        "exception_type": str(error.get("type", "")),
        "traceback": [],
        "current_inputs": {},
        "current_outputs": [],
    }
    return {"status_str": "error", "completed": False, "messages": [["execution_error", about]]}


def _error(status: Json) -> Json | None:
    return next((about for type, about in status.get("messages", ()) if type == "execution_error"), None)


def _files(outputs: Json) -> Iterator[tuple[str, str, Json]]:
    """The files of a history's outputs: node, medium, file."""
    for node, of in outputs.items():
        for medium, items in of.items():
            for item in items if isinstance(items, list) else ():
                if isinstance(item, dict) and "filename" in item:
                    yield node, medium, item


def _preview(outputs: Json) -> Json | None:
    """The file to show for all: the first that is kept, or else the first."""
    found = sorted(_files(outputs), key=lambda each: each[2].get("type") != "output")
    return {**found[0][2], "nodeId": found[0][0], "mediaType": found[0][1]} if found else None
