"""How far a picture is, for people who watch a terminal."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from octavo.pipeline.components import Components
    from octavo.pipeline.generate import Progress as Report
    from octavo.pipeline.generate import Watcher


@contextmanager
def progress_bar(console: "Console", components: "Components", previews: Path | None = None) -> Iterator["Watcher"]:
    """A bar with step rate and time left.

    Args:
        previews: folder in which a small preview is kept up to date; None for none.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=console.quiet) as bar:
        task = bar.add_task("", total=None, rate="")

        def watch(progress: "Report") -> None:
            if progress.stage == "decode" and progress.forecast:
                console.print(f"{progress.forecast} of {progress.step} evaluations were forecast.", style="dim")
            of = f" {progress.picture + 1}/{progress.pictures}" if progress.pictures > 1 else ""
            speed = bar.tasks[0].speed
            bar.update(
                task,
                description=f"{progress.stage}{of}",
                total=progress.steps or None,
                completed=progress.step,
                rate=f"{speed:.2f} it/s" if speed else "",
            )
            if previews is not None and progress.denoised is not None:
                previews.mkdir(parents=True, exist_ok=True)
                components.preview(progress.denoised).save(previews / "preview.png")

        yield watch
