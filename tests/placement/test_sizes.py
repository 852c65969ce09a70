"""Sizes as people write them."""

import pytest

from octavo.errors import RequestError
from octavo.placement.sizes import human, parse_bytes

GIB = 2**30


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("6GB", 6_000_000_000), ("6.5G", 6_500_000_000), ("3GiB", 3 * GIB), ("3gi", 3 * GIB), (" 800 mb ", 800_000_000),
        ("0.5TB", 500_000_000_000), ("2000000", 2_000_000), ("2000000B", 2_000_000),
        ("80%", 8 * GIB), ("12.5 %", 5 * GIB // 4),
    ],
)  # fmt: skip
def test_sizes_are_read(text: str, nbytes: int) -> None:
    assert parse_bytes(text, total=10 * GIB) == nbytes


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("six", "no size"), ("", "no size"), ("-3GB", "no size"), ("6GBs", "no size"), ("6 G B", "no size"),
        ("1e9", "no size"),
        ("6", "such as 6GB"), ("0GB", "no memory"), ("0%", "no memory"), ("101%", "more than there is"),
        ("nan", "no size"),
    ],
)  # fmt: skip
def test_what_is_no_size_is_refused_with_what_to_write(text: str, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        parse_bytes(text, total=10 * GIB)


def test_a_share_needs_a_whole() -> None:
    with pytest.raises(RequestError, match="share"):
        parse_bytes("80%")


@pytest.mark.parametrize("nbytes", [6_550_000_000, 142_000_000, 64_000, 12])
def test_what_is_written_can_be_read_again(nbytes: int) -> None:
    text = human(nbytes)
    assert parse_bytes(text if nbytes > 1000 else f"{nbytes / 1000}kB") == nbytes
