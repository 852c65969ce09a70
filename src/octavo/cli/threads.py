"""`--threads`, for commands that draw on a CPU."""

from typing import TYPE_CHECKING, Annotated

import typer

from octavo.errors import RequestError

if TYPE_CHECKING:
    from octavo.pipeline.components import Components

LARGE = 1 << 28  # weights of a model, from which on a trial takes less time than it saves

Threads = Annotated[
    int | None,
    typer.Option(
        "--threads", help="Threads on a CPU; if unsaid OMP_NUM_THREADS or, for large models, what a short trial finds."
    ),
]


def take_threads(count: int | None, components: "Components") -> None:
    """Let a CPU multiply with so many threads, or with as many as are best; before the model is loaded.

    Raises:
        RequestError: the model is not on a CPU.
    """
    if components.device.type != "cpu":
        if count is not None:
            raise RequestError(f"--threads is about CPUs, and this is on '{components.device}'. Leave it out.")
        return
    from octavo.placement.threads import pick_threads, use_threads

    skeleton = components.mmdit.skeleton
    weights = sum(weight.numel() for weight in (*skeleton.parameters(), *skeleton.buffers()))
    use_threads(pick_threads(count, measure=weights >= LARGE))
