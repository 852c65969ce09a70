"""Numbers of bytes as people write and read them. Nothing here imports torch."""

import re
from collections.abc import Mapping

from octavo.errors import RequestError

UNITS: Mapping[str, int] = {
    "": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12,
    "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40,
}  # fmt: skip
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:(%)|([kmgt]?i?)b?)", re.IGNORECASE)


def parse_bytes(text: str, *, total: int | None = None) -> int:
    """Bytes that are meant by "6GB", "6.5G", "3GiB", "800MB" or "80%".

    Args:
        text: a number and a unit; kB, MB, GB, TB are powers of 1000 and KiB, MiB, GiB, TiB of 1024, with or without the
            B, in any case. A share needs `total`.
        total: bytes that 100% stands for.

    Raises:
        RequestError: it is something else, no bytes at all, or a share of nothing known.
    """
    match = SIZE.fullmatch(text.strip())
    if match is None or (match[3] or "").lower() not in ("", *UNITS):
        raise RequestError(f"'{text}' is no size. Write a number with its unit, such as 6GB, 6.5G, 3GiB or 80%.")
    number, share, unit = float(match[1]), match[2], (match[3] or "").lower()
    if not share and not unit and number < 10**6:
        raise RequestError(f"'{text}' would be {text.strip()} bytes. Add the unit, such as {match[1]}GB.")
    if share:
        if total is None:
            raise RequestError(f"'{text}' is a share, but of a device whose memory is not known. Write it as 6GB.")
        if number > 100:
            raise RequestError(f"'{text}' is more than there is. Write 100% or less.")
        unit_bytes = total / 100
    else:
        unit_bytes = UNITS[unit]
    nbytes = round(number * unit_bytes)
    if nbytes <= 0:
        raise RequestError(f"'{text}' is no memory at all. Write what may be used, such as 6GB.")
    return nbytes


def human(nbytes: float) -> str:
    """Bytes as people read them, in powers of ten: "6.55 GB", "142 MB"."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if nbytes >= size:
            return f"{nbytes / size:.2f} {unit}" if unit == "GB" else f"{nbytes / size:.0f} {unit}"
    return f"{nbytes:.0f} B"
