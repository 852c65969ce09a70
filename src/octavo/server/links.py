"""Addresses of pictures that open by themselves, for an hour: the address holds a signature instead of a key."""

import hmac
import secrets
import time
from urllib.parse import quote

LIFETIME = 3600.0  # seconds
PLACE = "/v1/images/files/"


class Links:
    """Makes and knows addresses. Those of an earlier run of the server open nothing."""

    def __init__(self) -> None:
        self._secret = secrets.token_bytes(32)

    def path(self, name: str, now: float | None = None) -> str:
        """The path of a file in the output folder."""
        until = int((time.time() if now is None else now) + LIFETIME)
        return f"{PLACE}{until}-{self._signature(name, until)}/{quote(name)}"

    def name(self, path: str, now: float | None = None) -> str | None:
        """The file that a path, percent signs decoded, opens; None where it opens none (any more)."""
        ticket, slash, name = path.removeprefix(PLACE).partition("/")
        until, dash, signature = ticket.partition("-")
        if not (path.startswith(PLACE) and slash and dash and until.isascii() and until.isdigit() and len(until) < 15):
            return None
        expected = self._signature(name, int(until))
        fits = hmac.compare_digest(signature.encode("utf-8", "replace"), expected.encode())
        return name if fits and int(until) > (time.time() if now is None else now) else None

    def _signature(self, name: str, until: int) -> str:
        return hmac.new(self._secret, f"{until}/{name}".encode("utf-8", "replace"), "sha256").hexdigest()[:40]
