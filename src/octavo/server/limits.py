"""How much a request may be: bytes of its body, time between them, and pixels of its pictures."""

import asyncio
import base64
import binascii
import io
import warnings

from PIL import Image, ImageOps, UnidentifiedImageError
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from octavo.server import problems
from octavo.server.problems import Refused

# What may be sent; each is parsed by code that many others rely on.
PICTURE_FORMATS = ("PNG", "JPEG", "WEBP")
MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "I", "I;16", "F", "La", "RGBa"}


class BodyTooLargeError(Exception):
    """Ends the reading of a body; the answer has been sent."""


class Bounded:
    """Refuses bodies that are too large (413), whatever their header says, and senders that fall silent (408)."""

    def __init__(self, app: ASGIApp, *, max_body: int, timeout: float) -> None:
        self._app, self._max_body, self._timeout = app, max_body, timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "0")
        if not (announced.isascii() and announced.isdigit()) or int(announced) > self._max_body:
            await self._refuse_size(scope, receive, send)
            return
        received, whole, started, answered = 0, False, False, False

        async def bounded() -> Message:
            nonlocal received, whole, answered
            if whole:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), self._timeout)
            except TimeoutError:
                if not started:
                    answered = True
                    text = f"Nothing more of the request came for {self._timeout:g} seconds."
                    await _last_word(scope, receive, send, 408, "request_timeout", text)
                raise BodyTooLargeError from None
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                whole = not message.get("more_body", False)
                if received > self._max_body:
                    if not started:
                        answered = True
                        await self._refuse_size(scope, receive, send)
                    raise BodyTooLargeError
            return message

        async def unless_answered(message: Message) -> None:
            nonlocal started
            if not answered:
                started = True
                await send(message)

        try:
            await self._app(scope, bounded, unless_answered)
        except (BodyTooLargeError, ClientDisconnect):
            # Answered already, or nobody is there to hear it; the application could not say anything better.
            return

    async def _refuse_size(self, scope: Scope, receive: Receive, send: Send) -> None:
        text = f"The request is larger than {self._max_body} bytes, which this server takes at most (--max-body)."
        await _last_word(scope, receive, send, 413, "too_large", text)


async def _last_word(scope: Scope, receive: Receive, send: Send, status: int, kind: str, text: str) -> None:
    """Answer and hang up: what is still to come of the body is not wanted."""
    await problems.answer(scope, status, kind, text, headers={"Connection": "close"})(scope, receive, send)


def open_picture(data: bytes, *, max_pixels: int, field: str) -> Image.Image:
    """A picture that was sent, turned upright, as RGB, RGBA or L.

    Its size is read from the header and judged before any pixel is unpacked.

    Args:
        data: the file.
        max_pixels: more are refused.
        field: of the request, for the error's text.

    Raises:
        Refused: no picture, of no known format, damaged, too large, or moving.
    """

    def bad(why: str) -> Refused:
        return Refused(f"{field}: {why}", kind="invalid_image", param=field)

    try:
        with warnings.catch_warnings():
            # Pillow warns of large pictures; we refuse them by our own bound.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=PICTURE_FORMATS)
            width, height = image.size
            if width * height > max_pixels:
                raise bad(f"{width}x{height} is larger than the {max_pixels} pixels that this server takes.")
            if getattr(image, "n_frames", 1) > 1:
                raise bad("the picture moves; send a single one.")
            if image.mode not in MODES:
                raise bad(f"the picture's mode {image.mode} is not known.")
            image.load()
            upright = ImageOps.exif_transpose(image)
    except Refused:
        raise
    except Image.DecompressionBombError:
        raise bad(f"it is larger than the {max_pixels} pixels that this server takes.") from None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, KeyError) as error:
        reason = "no PNG, JPEG or WebP picture" if isinstance(error, UnidentifiedImageError) else f"damaged ({error})"
        raise bad(f"it is {reason}.") from error
    if upright.mode in ("RGB", "RGBA", "L"):
        return upright
    transparent = upright.mode in ("LA", "PA", "La", "RGBa") or "transparency" in upright.info
    return upright.convert("RGBA" if transparent else "RGB")


def from_base64(text: str, *, field: str) -> bytes:
    """The bytes of base64 text or of a `data:` URL.

    Raises:
        Refused: neither of them; an address is named as what it is, for nothing is fetched.
    """
    if text.lstrip()[:8].lower().startswith(("http://", "https:/", "file:", "ftp:")):
        raise Refused(
            f"{field}: this server fetches nothing from elsewhere; send the picture itself, in base64.",
            kind="no_fetching",
            param=field,
        )
    if text.startswith("data:"):
        head, comma, text = text.partition(",")
        if not comma or not head.endswith(";base64"):
            raise Refused(f"{field}: a data: URL must hold base64.", kind="invalid_image", param=field)
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        raise Refused(f"{field}: this is no base64.", kind="invalid_image", param=field) from None
