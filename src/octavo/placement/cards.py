"""What graphics cards can do, as data, so that a plan can be made for one that is not here.

Rates are those that large products reach, not those of the datasheet: either measured (`source` says so) or the
datasheet's dense rate with 32-bit sums times a fraction that is typical of the kind of card. Memory is what the driver
reports, links are what copies from pinned memory reach.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from octavo.devices import device_name, free_bytes
from octavo.errors import RequestError, did_you_mean

GIB = 2**30
TERA = 1e12

# Copies from pinned memory, bytes a second: 0.79 of what the lanes carry, as such copies usually reach.
PCIE3_X16, PCIE4_X8, PCIE4_X16, PCIE5_X16 = 12.5e9, 12.5e9, 25e9, 50e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """A graphics card, as far as plans and predictions need to know it."""

    name: str
    memory: int  # bytes
    bandwidth: float  # bytes/s of device memory, as reached
    bf16: float  # FLOP/s of large products in 16 bits, as reached; on cards without bfloat16 in float16
    fp8: float | None  # likewise in FP8; None where there are no such units, and FP8 weights are multiplied in 16 bits
    int8: float | None  # likewise in INT8 (`--fast`); None where that is not known
    link: float  # bytes/s from pinned host memory to the device
    reserved: int = 600 * 2**20  # bytes that the driver's context, torch's kernels and the display take
    source: str  # whence the rates are

    @property
    def usable(self) -> int:
        """Bytes for tensors on a card that nobody else uses."""
        return self.memory - self.reserved


def _datasheet(
    name: str,
    *,
    gib: float,
    bandwidth: float,
    tera: tuple[float, float | None, float],
    share: float,
    link: float,
) -> Card:
    """From the datasheet: GiB, bytes/s, dense Tera-operations a second in 16 bits, FP8 and INT8; bandwidth × 0.9."""
    of_16, of_fp8, of_int8 = tera
    return Card(
        name=name,
        memory=int(gib * GIB),
        bandwidth=0.9 * bandwidth,
        bf16=share * of_16 * TERA,
        fp8=None if of_fp8 is None else share * of_fp8 * TERA,
        int8=share * of_int8 * TERA,
        link=link,
        source=f"datasheet × {share:g} (products), × 0.9 (memory)",
    )


_H200 = Card(
    name="NVIDIA H200",
    memory=int(139.8 * GIB),
    bandwidth=4.3e12,
    bf16=790 * TERA,
    fp8=2 * 790 * TERA,
    int8=2 * 790 * TERA,
    link=PCIE5_X16,
    source="16-bit products and memory measured; FP8 and INT8 taken as twice that, the link as typical",
)

# Shares: consumer cards hold their clocks (0.85); servers' cards of 70 to 150 W do not (0.4 to 0.75); Hopper reaches in
# 16 bits what was measured on an H200, which has the same units (0.8).
CARDS: Mapping[str, Card] = {
    "rtx-3060-12gb": _datasheet(
        "GeForce RTX 3060", gib=12, bandwidth=360e9, tera=(25.5, None, 102), share=0.85, link=PCIE4_X16
    ),
    "rtx-4060-8gb": _datasheet(
        "GeForce RTX 4060", gib=8, bandwidth=272e9, tera=(30.2, 60.5, 121), share=0.85, link=PCIE4_X8
    ),
    "rtx-4070-12gb": _datasheet(
        "GeForce RTX 4070", gib=12, bandwidth=504e9, tera=(58.3, 116.6, 233), share=0.85, link=PCIE4_X16
    ),
    "rtx-4090-24gb": _datasheet(
        "GeForce RTX 4090", gib=24, bandwidth=1008e9, tera=(165.2, 330.3, 660), share=0.85, link=PCIE4_X16
    ),
    "t4-16gb": _datasheet("Tesla T4", gib=15, bandwidth=320e9, tera=(65, None, 130), share=0.4, link=PCIE3_X16),
    "l4-24gb": _datasheet("NVIDIA L4", gib=22.5, bandwidth=300e9, tera=(121, 242, 242), share=0.6, link=PCIE4_X16),
    "a10g-24gb": _datasheet("NVIDIA A10G", gib=22.3, bandwidth=600e9, tera=(70, None, 140), share=0.75, link=PCIE4_X16),
    "h100-80gb": _datasheet(
        "NVIDIA H100", gib=79.6, bandwidth=3350e9, tera=(989, 1979, 1979), share=0.8, link=PCIE5_X16
    ),
    "h200": _H200,
}


def card_called(name: str) -> Card:
    """The card of this name.

    Raises:
        RequestError: it is not in the table.
    """
    key = name.lower().replace("_", "-").replace(" ", "-")
    if key in CARDS:
        return CARDS[key]
    starting = [known for known in CARDS if known.startswith(key)]
    if key and len(starting) == 1:
        return CARDS[starting[0]]
    raise RequestError(f"No card called '{name}' is known. Use {', '.join(CARDS)}.{did_you_mean(key, CARDS)}")


def card_here(device: torch.device, *, measure: bool = False) -> Card | None:
    """The card of this machine: one of the table by its name, with the memory that it really has.

    Args:
        device: of this machine.
        measure: take its rates, its memory's and its link's by short trials rather than from the table (a second).

    Returns:
        None for what is no CUDA device, and for a card that the table does not know unless it is measured.
    """
    if device.type != "cuda":
        return None
    known = card_like(device_name(device))
    total = torch.cuda.mem_get_info(device)[1]
    if measure:
        from octavo.placement.trial import measured_card

        return measured_card(device, device_name(device), total)
    return None if known is None else replace(known, memory=total)


def card_like(said: str) -> Card | None:
    """The card of the table that a driver calls by this name, such as "NVIDIA GeForce RTX 4070"; else None.

    A name with more to it, such as "RTX 4070 Ti" or "H100 PCIe", is another card.
    """
    words = _words(said)
    for card in CARDS.values():
        if _words(card.name) == words:
            return card
    return None


def budget_here(device: torch.device) -> int | None:
    """Bytes that tensors may take on `device` now: what is free. None where the system does not tell."""
    return free_bytes(device)


def _words(name: str) -> tuple[str, ...]:
    """What tells cards apart in their names."""
    common = {"nvidia", "geforce", "tesla", "gpu", "sxm", "sxm5", "hbm3", "80gb", "24gb", "12gb", "8gb", "16gb"}
    return tuple(word for word in re.split(r"[\s-]+", name.lower()) if word not in common)
