"""How much a workflow may ask for at once; more is refused before any memory is taken."""

from octavo.errors import RequestError
from octavo.graph.context import Context

MOST_PIXELS = 1 << 28  # of all pictures of one batch: 3.2 GB in float32, one of 16384 by 16384
ROOM = 16  # times as many as may be drawn in one picture: so large are batches, and pictures that are only loaded

MOST_CONDITIONS = 64  # of one conditioning: the model is asked with each of them at every step
MOST_TOKENS = 16384  # of one condition, over the texts that were joined: attention's work grows with the square


def check_drawn(context: Context, width: int, height: int, batch: int = 1) -> None:
    """Refuse latents larger than this machine's owner lets anyone draw, and batches that no one can mean.

    Args:
        context: tells how large a picture may be.
        width, height: in pixels of the picture.
        batch: how many there are.

    Raises:
        RequestError: it is too much.
    """
    if width * height > context.max_pixels:
        raise RequestError(
            f"A picture of {width}x{height} has {width * height:,} pixels, and {context.max_pixels:,} may be drawn. "
            f"Ask for a smaller one."
        )
    check_size(context, width, height, batch)


def check_size(context: Context, width: int, height: int, batch: int = 1) -> None:
    """Refuse pictures that need more memory than anyone can mean; as `check_drawn`, for those that are not drawn."""
    most = min(MOST_PIXELS, ROOM * context.max_pixels)
    if width * height * batch > most:
        what = f"{batch} pictures of {width}x{height} have" if batch != 1 else f"A picture of {width}x{height} has"
        raise RequestError(
            f"{what} {width * height * batch:,} pixels, and {most:,} are the most. Ask for fewer or smaller ones."
        )


def check_conditions(count: int) -> None:
    """Refuse more conditions than anyone can mean: one step of them would hold all other requests up.

    Raises:
        RequestError: there are too many.
    """
    if count > MOST_CONDITIONS:
        raise RequestError(
            f"Combined, these are {count} conditions, and {MOST_CONDITIONS} are the most. Combine fewer."
        )


def check_tokens(count: int) -> None:
    """Refuse joined texts that are longer than anyone can mean.

    Raises:
        RequestError: there are too many tokens.
    """
    if count > MOST_TOKENS:
        raise RequestError(f"Joined, these are {count} tokens, and {MOST_TOKENS} are the most. Join fewer texts.")
