"""The option about the device's memory that commands which draw have in common."""

from typing import Annotated

import typer

Vram = Annotated[
    str | None,
    typer.Option(
        "--vram",
        help="GPU memory that may be used, such as 6GB or 80%; all that is free if unsaid. The pictures stay the same.",
        rich_help_panel="Memory",
    ),
]


def allowed(vram: str | None, device: str | None) -> str | None:
    """What was said, if it can be heeded.

    Raises:
        RequestError: there is no GPU, or what was said is no size.
    """
    if vram is None:
        return None
    from octavo.devices import pick_device
    from octavo.pipeline.placing import check_vram

    check_vram(vram, pick_device(device))
    return vram
