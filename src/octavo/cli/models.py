"""`octavo models`: what is in the models tree."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from octavo.checkpoint.library import Item


def models(
    models_dir: Annotated[
        str | None, typer.Option(envvar="OCTAVO_MODELS", help="Folder laid out as ComfyUI's models/.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """List the models that are here, and what each file holds."""
    from octavo.checkpoint.folders import Folders
    from octavo.checkpoint.library import survey

    folders = Folders.standard(models_dir)
    items = survey(folders)
    if as_json:
        print(json.dumps([_plain(item) for item in items], indent=1))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from octavo.checkpoint.kinds import TITLES
    from octavo.cli.info import human

    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("folder", "name", "holds", "bytes"):
        table.add_column(heading, overflow="fold")
    for item in items:
        holds = ", ".join(TITLES[kind] for kind in item.kinds) or "nothing that Octavo knows"
        table.add_row(
            item.file.category,
            Text(item.file.name),
            Text(item.problem, style="red") if item.problem else holds + (" (embedded)" if item.file.embedded else ""),
            human(item.nbytes),
        )
    console = Console()
    console.print(table)
    if all(item.file.embedded for item in items):
        where = folders.searched("checkpoints")[0].parent
        console.print(
            Text(f"\nOnly the embedded model. 'octavo pull sd3.5-medium' brings a released one into {where}."),
            soft_wrap=True,
        )


def _plain(item: Item) -> dict[str, object]:
    return {
        "category": item.file.category,
        "name": item.file.name,
        "path": str(item.file.path),
        "embedded": item.file.embedded,
        "bytes": item.nbytes,
        "kinds": list(item.kinds),
        "problem": item.problem,
    }
