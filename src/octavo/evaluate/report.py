"""A comparison as files that people read: report.html (all in one file), report.md, and report.json for programs.

OUT/report.html     table, pictures side by side, plots; nothing is fetched when it is opened
OUT/report.md       the same table, with links to OUT/sheet.webp and OUT/*.svg
OUT/report.json     everything the table says, see `Comparison.to_json`
OUT/results.json    the scores of every picture
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from PIL import Image, ImageChops

from octavo.evaluate.comparison import ColumnResult, Comparison
from octavo.evaluate.drawn import SAME_MODEL
from octavo.evaluate.gallery import write_text
from octavo.evaluate.plots import Series, line_chart
from octavo.evaluate.prompt_set import STANDING, builtin_prompts
from octavo.evaluate.table import Group, groups_of
from octavo.pipeline.image import open_image

SHOWN, LEAST_ALIKE = 8, 4  # pictures: the first ones, and those where a column differs most from the reference
SIDE = 512  # of inlined pictures, in pixels
AMPLIFIED = 8


def write_report(comparison: Comparison, out: Path) -> list[Path]:
    """Write all files of a report.

    Returns:
        Their paths, the page first.
    """
    report = comparison.to_json()
    groups = groups_of(report)
    charts = _charts(comparison)
    for name, chart in charts.items():
        write_text(out / f"{name}.svg", chart)
    shown = shown_numbers(comparison)
    sheet(comparison, shown[:SHOWN]).save(out / "sheet.webp", quality=90)
    write_text(out / "report.json", json.dumps(report, indent=1) + "\n")
    write_text(out / "results.json", json.dumps(comparison.results(), indent=1, sort_keys=True) + "\n")
    write_text(out / "report.md", _markdown(comparison, report, groups, charts))
    write_text(out / "report.html", _html(comparison, report, groups, charts, shown))
    return [out / name for name in ("report.html", "report.md", "report.json", "results.json")]


def shown_numbers(comparison: Comparison) -> list[int]:
    """Pictures to show: the first ones, which are the standing prompts', then those that a column got least alike."""
    numbers = sorted(set.intersection(*(set(column.drawn.paths) for column in comparison.columns)))
    numbers = numbers or sorted(comparison.columns[0].drawn.paths)
    first = numbers[:SHOWN]
    worst = {
        number: min(values)
        for number in numbers
        if number not in first
        and (values := [float(c.scores.by_picture[number].get("psnr", 100)) for c in comparison.columns])
        and min(values) < 100
    }
    return [*first, *sorted(worst, key=lambda number: worst[number])[:LEAST_ALIKE]]


def sheet(comparison: Comparison, numbers: Sequence[int], side: int = 192) -> Image.Image:
    """Pictures side by side: a row a prompt, a column a model."""
    image = Image.new("RGB", (len(comparison.columns) * (side + 4) + 4, len(numbers) * (side + 4) + 4), "white")
    for row, number in enumerate(numbers):
        for place, column in enumerate(comparison.columns):
            if path := column.drawn.paths.get(number):
                picture = open_image(path).convert("RGB").resize((side, side), Image.Resampling.LANCZOS)
                image.paste(picture, (4 + place * (side + 4), 4 + row * (side + 4)))
    return image


def _charts(comparison: Comparison) -> dict[str, str]:
    measured = [(column.drawn.name, errors) for column in comparison.columns if (errors := column.drawn.velocity)]
    if not measured:
        return {}
    by_step = [Series(name, range(1, len(e.by_step) + 1), e.by_step, ink) for ink, (name, e) in enumerate(measured)]
    by_block = [
        series
        for ink, (name, e) in enumerate(measured)
        for series in (
            Series(f"{name}, image tokens", range(1, len(e.image_by_block) + 1), e.image_by_block, ink),
            Series(f"{name}, text tokens", range(1, len(e.context_by_block) + 1), e.context_by_block, ink, True),
        )
    ]
    return {
        "error-by-step": line_chart("Relative error of the velocity by step", "step, from noise to picture", by_step),
        "error-by-layer": line_chart("Relative error behind each joint block", "joint block", by_block),
    }


# ── in words ──────────────────────────────────────────────────────────────────────────────────────────────────────
def _notes(report: Mapping[str, Any]) -> list[str]:
    """What a reader has to know to read the numbers right."""
    features, network = report["network"]["features"], report["network"]["name"]
    reference_set = report["reference_set"]
    pictures = min(int(column["scores"]["pictures"]) for column in report["columns"])
    notes = [
        f"Pictures of one row share prompt and seed. PSNR, SSIM and the {report['distance']} compare each with that of "
        f"{report['columns'][0]['name']}; equal pictures count as 100 dB.",
        f"The prompt score, FID and CMMD are counted by {network}, and are comparable with nothing that was counted by "
        "another network.",
        *([f"The reference set is {reference_set}."] if reference_set else []),
        f"FID is of {pictures} pictures or more a set in {features} dimensions; it is biased upwards where pictures "
        "are few, alike for all columns, so read its rise and not its height. The percentiles resample the prompts, "
        "the same ones for both columns: a rise whose range holds 0 may be chance.",
        "Errors of latents and velocity are relative: root mean square of the difference over that of the reference. "
        "The velocity's is teacher-forced: every model is asked what the reference was asked.",
        "Times are wall clock on the machine below, median over pictures but the first after loading. Host memory is "
        "that of the whole process, what Python and torch themselves take included.",
    ]
    if network == "the embedded model's judge" and not report["embedded"]:
        notes.append(
            "The judge knows nothing but the embedded model's flat shapes. For pictures of other things its numbers "
            "mean little: pass --clip."
        )
    if any(name.endswith(SAME_MODEL) for name in (column["name"] for column in report["columns"])):
        notes.append("The column of other seeds is the same model with other noise: how far chance alone goes.")
    return notes


def _conditions(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    settings = report["settings"]
    asked = ", ".join(
        f"{key.replace('_', ' ')} {settings[key]}"
        for key in ("width", "height", "steps", "guidance_scale", "sampler", "schedule", "shift")
        if key in settings
    )
    machine = ", ".join(f"{key} {value}" for key, value in report["machine"].items() if value is not None)
    lines = [
        ("Prompts", f"{report['prompts']}, seeds from {report['seed']}"),
        ("Settings", asked),
        ("Machine", machine),
        ("Command", report["command"]),
    ]
    for column in report["columns"]:
        facts = column["facts"]
        told = "; ".join(str(facts[key]) for key in ("headline", "arithmetic") if key in facts)
        lines.append((column["name"], told or "pictures made elsewhere"))
    return [(name, text) for name, text in lines if text]


def _markdown(
    comparison: Comparison, report: Mapping[str, Any], groups: Sequence[Group], charts: Mapping[str, str]
) -> str:
    names = [_cell(column.drawn.name) for column in comparison.columns]
    lines = [f"# {_title(comparison)}", ""]
    lines += ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for group in groups:
        lines.append(f"| **{_cell(group.title)}** |" + " |" * len(names))
        for line in group.lines:
            cells = [f"{c.value} ({c.difference})" if c.difference else c.value for c in line.cells]
            lines.append(f"| {_cell(line.title)} | " + " | ".join(cells) + " |")
    lines += ["", *(f"- {note}" for note in _notes(report)), "", "![Pictures side by side](sheet.webp)", ""]
    lines += [f"![{name.replace('-', ' ')}]({name}.svg)" for name in charts]
    lines += ["", *(f"- {name}: {text}" for name, text in _conditions(report)), ""]
    return "\n".join(lines)


def _title(comparison: Comparison) -> str:
    first, *others = (column.drawn.name for column in comparison.columns)
    others = [name for name in others if not name.endswith(SAME_MODEL)]
    return f"{', '.join(others)} against {first}" if others else first


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


# ── the page ──────────────────────────────────────────────────────────────────────────────────────────────────────
def _html(
    comparison: Comparison,
    report: Mapping[str, Any],
    groups: Sequence[Group],
    charts: Mapping[str, str],
    shown: Sequence[int],
) -> str:
    names = [column.drawn.name for column in comparison.columns]
    style = files("octavo.evaluate").joinpath("report.css").read_text("utf-8")
    title = _title(comparison)
    head = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style></head>"
    )
    body = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{len(comparison.prompts)} prompts, seeds from {comparison.seed}. Made by Octavo.</p>",
        _table(names, groups),
        "<h2>Pictures</h2>",
        *(_card(comparison, number, index) for index, number in enumerate(shown)),
    ]
    if charts:
        body += ["<h2>Where the error arises</h2>", '<div class="charts">', *charts.values(), "</div>"]
    body += ["<h2>How to read this</h2><ul>", *(f"<li>{escape(note)}</li>" for note in _notes(report)), "</ul>"]
    body += ["<h2>How it was made</h2><dl>"]
    body += [f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in _conditions(report)]
    prompts = "".join(f"<li>{escape(prompt.text)}</li>" for prompt in comparison.prompts)
    body += ["</dl>", f"<details><summary>All prompts</summary><ol>{prompts}</ol></details>"]
    return f"{head}<body><main>{''.join(body)}</main></body></html>\n"


def _table(names: Sequence[str], groups: Sequence[Group]) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    rows = []
    for group in groups:
        rows.append(f'<tr class="group"><th colspan="{len(names) + 1}">{escape(group.title)}</th></tr>')
        for line in group.lines:
            cells = "".join(
                f"<td>{escape(c.value)}{f'<small>{escape(c.difference)}</small>' if c.difference else ''}</td>"
                for c in line.cells
            )
            rows.append(f'<tr><th scope="row">{escape(line.title)}</th>{cells}</tr>')
    body = "".join(rows)
    return f'<div class="scroll"><table><thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _card(comparison: Comparison, number: int, index: int) -> str:
    """One prompt's pictures side by side, and how each differs from the reference's."""
    first = comparison.columns[0]
    figures = []
    for column in comparison.columns:
        path = column.drawn.paths.get(number)
        if path is None:
            continue
        picture = open_image(path).convert("RGB")
        figures.append(_figure(picture, column.drawn.name, _remarks(column, number), _apart(column, first, number)))
    standing = builtin_prompts(STANDING, embedded=comparison.embedded)
    prompt = comparison.prompts[number - 1]
    kind = "standing prompt" if prompt in standing else "least alike" if index >= SHOWN else ""
    mark = f"<b>{kind}</b> " if kind else ""
    row = f'<div class="row">{"".join(figures)}</div>'
    return f'<section class="card"><p>{mark}{number}. {escape(prompt.text)}</p>{row}</section>'


def _apart(column: ColumnResult, reference: ColumnResult, number: int) -> Image.Image | None:
    """Where a picture differs from the reference's, amplified; None where they do not share their noise."""
    wanted = reference.drawn.paths.get(number)
    if column is reference or not column.drawn.same_seed or wanted is None:
        return None
    a, b = (open_image(path).convert("RGB") for path in (column.drawn.paths[number], wanted))
    return ImageChops.difference(a, b).point(lambda v: min(255, AMPLIFIED * v)) if a.size == b.size else None


def _remarks(column: ColumnResult, number: int) -> str:
    values = column.scores.by_picture[number]
    told = []
    if "psnr" in values:
        told.append(f"{values['psnr']:.1f} dB")
    if "right_all" in values:
        told.append("right" if values["right_all"] else "wrong")
    if "typography" in values:
        told.append(f"words read: {100 * values['typography']:.0f} %")
    return ", ".join(told)


def _figure(picture: Image.Image, name: str, remarks: str, apart: Image.Image | None) -> str:
    """A picture, what is said of it, and where it differs."""
    small = f"<small>{escape(remarks)}</small>" if remarks else ""
    difference = f"{_inlined(apart, 'difference')}<small>difference × {AMPLIFIED}</small>" if apart else ""
    return f"<figure>{_inlined(picture, name)}<figcaption>{escape(name)}{small}</figcaption>{difference}</figure>"


def _inlined(picture: Image.Image, name: str) -> str:
    """A picture inside the page: without loss where it is small, else scaled to `SIDE` and compressed."""
    if max(picture.size) > SIDE:
        picture = picture.copy()
        picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    picture.save(data, "WEBP", lossless=max(picture.size) <= SIDE // 2, quality=88)
    source = base64.b64encode(data.getvalue()).decode()
    width, height = picture.size
    return f'<img src="data:image/webp;base64,{source}" alt="{escape(name)}" width="{width}" height="{height}">'
