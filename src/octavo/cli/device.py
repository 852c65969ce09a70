"""The page of `octavo info --device`: what this machine can do, and how it would multiply by FP8 weights."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from rich.console import RenderableType

    from octavo.fp8.survey import Finding
    from octavo.placement.survey import AttentionFinding


def machine(device: torch.device) -> dict[str, Any]:
    """What is known of `device`, as JSON has it."""
    import torch

    from octavo.devices import device_name, free_bytes, pick_dtype
    from octavo.fp8.needs import dtype_name
    from octavo.fp8.timing import cache_folder
    from octavo.fp8.verdicts import unfit
    from octavo.placement.survey import starting
    from octavo.placement.threads import pick_threads

    facts: dict[str, Any] = {
        "device": str(device),
        "name": device_name(device),
        "free_bytes": free_bytes(device),
        "dtype": dtype_name(pick_dtype(None, device)),
        "torch": torch.__version__,
        "cache": str(cache_folder()),
        "steps": starting(device),
        "steps_not_fused": unfit(device, pick_dtype(None, device)),  # why; null where they can be
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["total_bytes"] = properties.total_memory
        facts["multiprocessors"] = properties.multi_processor_count
        facts["compute_capability"] = [properties.major, properties.minor]
        facts["multiplies_in_fp8"] = (properties.major, properties.minor) >= (8, 9)
    else:
        facts["cores"] = os.cpu_count()
        picked = pick_threads()
        facts["threads"], facts["threads_why"] = picked.count, picked.why
        facts["multiplies_in_fp8"] = False
    return facts


def as_json(facts: dict[str, Any], findings: list[Finding], ways: list[AttentionFinding]) -> dict[str, Any]:
    """The whole page."""
    from dataclasses import asdict

    from octavo.fp8.survey import SHAPES

    shapes = [{"what": shape.what, "M": shape.M, "K": shape.K, "N": shape.N} for shape in SHAPES]
    fields = ("name", "about", "needs", "rows", "exact", "fast", "chosen", "milliseconds")
    backends = [{field: getattr(finding, field) for field in fields} for finding in findings]
    return {**facts, "shapes": shapes, "backends": backends, "attention": list(map(asdict, ways))}


def page(facts: dict[str, Any], findings: list[Finding]) -> list[RenderableType]:
    """The same for people."""
    from rich.table import Table
    from rich.text import Text

    from octavo.cli.info import human
    from octavo.fp8.survey import SHAPES

    free = "" if facts["free_bytes"] is None else f"{human(facts['free_bytes'])} of memory free"
    if facts.get("total_bytes"):
        free += f" of {human(facts['total_bytes'])}"
    if "compute_capability" in facts:
        power = f"compute capability {'.'.join(map(str, facts['compute_capability']))}"
    else:
        power = f"{facts['cores']} cores, {facts['threads']} threads ({facts['threads_why']})"
    fp8 = "multiplies in FP8" if facts["multiplies_in_fp8"] else "has no FP8 units: FP8 weights save memory here"
    lines: list[RenderableType] = [
        Text.assemble((facts["device"], "bold"), f"  {facts['name']}"),
        Text(f"{power}; {free}"),
        Text(f"{fp8}; computes in {facts['dtype']} unless told otherwise; torch {facts['torch']}"),
        Text(_steps(facts["steps_not_fused"])),
        "",
    ]
    table = Table(
        "backend", "what it does", "fused", "exact", "--fast", "needs", box=None, pad_edge=False, header_style="dim"
    )
    for finding in findings:
        if finding.needs:
            exact, fast = (_use(finding, mode) for mode in ("exact", "fast"))
            table.add_row(
                Text(finding.name, "bold"), finding.about, finding.rows or "", exact, fast, Text(finding.needs, "dim")
            )
    lines.append(table)
    reasons = [
        Text(f"{finding.name}: {finding.fast}.", "dim")
        for finding in findings
        if finding.fast is not None and finding.needs
    ]
    lines += ["", "Not usable here:", *reasons] if reasons else []
    if any(time is not None for finding in findings for time in finding.milliseconds):
        times = Table("milliseconds", box=None, pad_edge=False, header_style="dim")
        for shape in SHAPES:
            times.add_column(f"{shape.what}\n{shape.M}×{shape.K}→{shape.N}", justify="right")
        for finding in findings:
            if any(time is not None for time in finding.milliseconds):
                times.add_row(Text(finding.name, "bold"), *map(_time, finding.milliseconds))
        lines += ["", times, "", Text(f"Times are kept in {facts['cache']}.", "dim")]
    return lines


def attention_page(facts: dict[str, Any], ways: list[AttentionFinding]) -> list[RenderableType]:
    """Ways to attend, for people, and what makes steps start faster."""
    from rich.table import Table
    from rich.text import Text

    timed = any(way.milliseconds is not None for way in ways)
    heads = ("attention", "what it does", "error", "exact", "--fast", *(["ms"] if timed else []), "needs")
    table = Table(*heads, box=None, pad_edge=False, header_style="dim")
    for way in ways:
        error = "" if way.error is None else f"{way.error:.1%}"
        times = [_time(way.milliseconds)] if timed else []
        uses = (_use(way, "exact"), _use(way, "fast"))
        table.add_row(Text(way.name, "bold"), way.about, error, *uses, *times, Text(way.needs, "dim"))
    reasons = [Text(f"{way.name}: {way.fast}.", "dim") for way in ways if way.fast is not None]
    options = [
        Text(f"{option}: {'usable' if why is None else f'not here: {why}'}.") for option, why in facts["steps"].items()
    ]
    lines: list[RenderableType] = ["", table, ""]
    lines += ["Not usable here:", *reasons, ""] if reasons else []
    return [*lines, *options]


def _steps(why_not: str | None) -> str:
    if why_not is None:
        return "fuses the steps between products where that is measured to pay"
    return f"takes the steps between products one by one: a fused one {why_not}"


def _use(finding: Finding | AttentionFinding, mode: str) -> str:
    if getattr(finding, mode) is not None:
        return ""
    return "taken" if mode in finding.chosen else "usable"


def _time(value: float | str | None) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else f"{value:.3g}"
