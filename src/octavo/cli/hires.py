"""`--hires` and what goes with it: a second, larger pass."""

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from octavo.errors import RequestError

if TYPE_CHECKING:
    from octavo.pipeline.hires import Hires

PANEL = "Second, larger pass"
NONE = "no"
LACKS = "say how the second pass is drawn, and there is none: ask for it, as in --hires 2."

Wanted = Annotated[
    str | None,
    typer.Option(
        "--hires",
        help="Draw at --size, make that larger, and draw it again from there: by a factor, such as 1.5, or to a size, "
        "such as 2048x2048; 'no' leaves out that of --from.",
        rich_help_panel=PANEL,
    ),
]
Method = Annotated[
    str | None,
    typer.Option(
        "--hires-method",
        help="How it is made larger: as pixels by lanczos (if unsaid), bicubic, bilinear, nearest-exact; or as latents "
        "by latent-bislerp, latent-bicubic, …",
        rich_help_panel=PANEL,
    ),
]
Denoise = Annotated[
    float | None,
    typer.Option("--hires-denoise", help="How much of it is made anew, 0 to 1; 0.5 if unsaid.", rich_help_panel=PANEL),
]
Steps = Annotated[
    int | None, typer.Option("--hires-steps", help="Its steps; as --steps if unsaid.", rich_help_panel=PANEL)
]
Guidance = Annotated[
    float | None, typer.Option("--hires-guidance", help="As --guidance if unsaid.", rich_help_panel=PANEL)
]
Sampler = Annotated[str | None, typer.Option("--hires-sampler", help="As --sampler if unsaid.", rich_help_panel=PANEL)]
Schedule = Annotated[
    str | None, typer.Option("--hires-schedule", help="As --schedule if unsaid.", rich_help_panel=PANEL)
]
Prompt = Annotated[
    str | None, typer.Option("--hires-prompt", help="What it shows; the prompt if unsaid.", rich_help_panel=PANEL)
]
Negative = Annotated[
    str | None, typer.Option("--hires-negative", help="As --negative if unsaid.", rich_help_panel=PANEL)
]


def asked(size: str | None, **given: Any) -> dict[str, Any] | None:
    """The fields of `Hires` that are given; `{}` for none at all where a picture's own is to be left out, else None.

    Args:
        size: what stands after --hires.
        given: by the names of `Hires`, None where nothing is given.

    Raises:
        RequestError: it is neither factor nor size.
    """
    found = {name: value for name, value in given.items() if value is not None}
    if size is None:
        return found or None
    if size.strip().lower() == NONE:
        if found:
            raise RequestError(f"--hires {NONE} and {_options(found)} contradict each other: leave one of them out.")
        return {}
    return found | _factor_or_size(size)


def laid_over(base: "Hires | None", given: dict[str, Any]) -> "Hires | None":
    """What is given, over the second pass of the picture that is repeated, if it has one.

    Raises:
        RequestError: something is said of a second pass, and nobody asks for one.
    """
    from octavo.pipeline.hires import Hires

    if not given:
        return None
    if not given.keys() & {"scale", "width"}:
        if base is None:
            raise RequestError(f"{_options(given)}: these {LACKS}")
        return replace(base, **given)
    return replace(base or Hires(), **{"scale": None, "width": None, "height": None} | given)


def _options(fields: dict[str, Any]) -> str:
    names = {"guidance_scale": "guidance", "negative_prompt": "negative"}
    return ", ".join(f"--hires-{names.get(name, name)}" for name in fields)


def _factor_or_size(text: str) -> dict[str, Any]:
    width, by, height = (part.strip() for part in text.lower().replace("×", "x").partition("x"))
    try:
        return {"width": int(width), "height": int(height)} if by else {"scale": float(width)}
    except ValueError:
        raise RequestError(
            f"--hires {text}: write a factor, such as 1.5, or width x height in pixels, such as 2048x2048."
        ) from None
