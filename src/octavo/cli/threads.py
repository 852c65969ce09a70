"""`--threads`, for commands that draw or compute on a CPU."""

from typing import Annotated

import typer

Threads = Annotated[
    int | None,
    typer.Option(
        "--threads", help="Threads on a CPU; if unsaid OMP_NUM_THREADS or, for large models, what a short trial finds."
    ),
]
