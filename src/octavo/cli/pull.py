"""`octavo pull`: bring released files into the models tree.

What the names mean is in `checkpoint.releases`; asking, fetching and proving in `checkpoint.hub`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from octavo.errors import RequestError

if TYPE_CHECKING:
    from octavo.checkpoint.releases import License, Release


def pull(
    names: Annotated[
        list[str] | None, typer.Argument(help="What to bring: sd3.5-medium, text-encoders, ...; --list shows all.")
    ] = None,
    models_dir: Annotated[
        Path, typer.Option(envvar="OCTAVO_MODELS", help="Models tree to put the files into, laid out as ComfyUI's.")
    ] = Path("models"),
    token: Annotated[
        str | None, typer.Option(help="Token for gated models; else HF_TOKEN or the login of 'hf auth login'.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Accept the licences without being asked.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace files that differ from the published ones.")] = False,
    show_list: Annotated[bool, typer.Option("--list", help="Show what can be brought, and leave.")] = False,
) -> None:
    """Download released models, with resume, checksums and a look at the free space first.

    Files that are here already are not fetched again; an interrupted download goes on where it stopped.
    """
    from octavo.checkpoint import hub
    from octavo.checkpoint.releases import named

    if show_list:
        _print_list(models_dir)
        return
    if not names:
        raise RequestError("Say what to pull, such as 'octavo pull sd3.5-medium'; 'octavo pull --list' shows all.")
    releases = named(names)
    plan = hub.plan(
        [file for release in releases for file in release.files], models_dir, token=token, replace=force, report=_say
    )
    for path in plan.present:
        _say(f"Already here: {path}")
    if plan.downloads:
        for download in plan.downloads:
            begun = f", of which {_size(download.held)} are here" if download.held else ""
            _say(f"To bring: {download.target} ({_size(download.bytes)}{begun}) from {download.file.repo}")
        licenses = dict.fromkeys(license for download in plan.downloads for license in download.file.licenses)
        _accept(list(licenses), yes=yes)
    for download in plan.downloads:
        typer.echo(hub.fetch(download, token=token, report=_say))
    _suggest_encoders(releases, models_dir)


def _accept(licenses: list[License], *, yes: bool) -> None:
    """Show the licences; those that bind the user must be accepted."""
    for license in licenses:
        _say(f"Licence: {license.name}: {license.terms}. {license.url}")
    if yes or not any(license.must_accept for license in licenses):
        return
    try:
        accepted = typer.confirm("Do you accept these terms?", err=True)
    except typer.Abort:  # nobody is there to ask
        accepted = False
    if not accepted:
        raise RequestError("The licence was not accepted, so nothing was fetched. --yes accepts without asking.")


def _suggest_encoders(releases: list[Release], models_dir: Path) -> None:
    from octavo.checkpoint.releases import RELEASES

    encoders = RELEASES["text-encoders"], RELEASES["text-encoders-fp8"]
    asked_for = any(release in encoders for release in releases)
    if any(release.wants_encoders for release in releases) and not (
        asked_for or any(_is_here(release, models_dir) for release in encoders)
    ):
        _say(
            f"The model reads prompts with text encoders: 'octavo pull text-encoders' brings them "
            f"({_size(encoders[0].bytes)}), 'octavo pull text-encoders-fp8' a smaller set ({_size(encoders[1].bytes)})."
        )


def _print_list(models_dir: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    from octavo.checkpoint.releases import RELEASES

    table = Table(box=None, pad_edge=False)
    table.add_column("name", no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True)
    for title in ("token", "here", "what"):
        table.add_column(title)
    for release in RELEASES.values():
        gated = any(file.gated for file in release.files)
        here = _is_here(release, models_dir)
        table.add_row(
            release.name, _size(release.bytes), "needed" if gated else "", "yes" if here else "", release.about
        )
    Console().print(table)


def _is_here(release: Release, models_dir: Path) -> bool:
    from octavo.checkpoint.hub import places

    return all(any(path.is_file() for path in places(file, models_dir)) for file in release.files)


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


def _say(text: str) -> None:
    """What is going on goes to stderr; stdout has only the places of fetched files."""
    typer.echo(text, err=True)
