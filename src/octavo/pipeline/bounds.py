"""Numbers that a request may hold."""

from octavo.errors import RequestError

MULTIPLE = 16  # of the sides of what is drawn: two latent pixels a token, eight pixels each


def check_number(name: str, value: float | None, low: float, high: float) -> None:
    """A number within bounds, both included; None passes. NaN fails every comparison and so is refused.

    Raises:
        RequestError: it is none, or out of bounds.
    """
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise RequestError(f"{name} {value!r} is out of range: from {low} to {high}.")


def check_side(name: str, pixels: int | None) -> None:
    """A side that the model can draw; None passes.

    Raises:
        RequestError: it is not; says the nearest that is.
    """
    if pixels is not None and (pixels < MULTIPLE or pixels % MULTIPLE):
        near = nearest_side(pixels)
        raise RequestError(f"{name} {pixels} is not a positive multiple of 16, which the model needs; use {near}.")


def nearest_side(pixels: float) -> int:
    """The side nearest to so many pixels that the model can draw."""
    return max(MULTIPLE, round(pixels / MULTIPLE) * MULTIPLE)
