"""What the CUDA device of this machine reaches, by short trials: products, memory and the link.

Each is the best of a few, for a trial can be disturbed and never helped. It takes about a second and 0.6 GB.
"""

import time
from collections.abc import Callable

import torch

from octavo.placement.cards import Card

SIDE = 8192  # of square matrices: large enough to fill any card for a millisecond
COPIED = 256 << 20  # bytes


def measured_card(device: torch.device, name: str, memory: int) -> Card:
    """The card of `device`.

    Args:
        device: a CUDA device.
        name: what its maker calls it.
        memory: bytes it has.
    """
    capability = torch.cuda.get_device_capability(device)
    dtype = torch.bfloat16 if capability >= (8, 0) else torch.float16
    a = torch.randn(SIDE, SIDE, device=device, dtype=dtype)
    b = torch.randn(SIDE, SIDE, device=device, dtype=dtype)
    flop = 2.0 * SIDE**3
    bf16 = flop / _best(lambda: a @ b, device)
    fp8 = None
    if capability >= (8, 9):
        qa, qb = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()
        one = torch.ones((), device=device)
        fp8 = flop / _best(lambda: torch._scaled_mm(qa, qb, scale_a=one, scale_b=one, out_dtype=torch.bfloat16), device)
    int8 = None
    if capability >= (8, 0):
        ia, ib = (torch.randint(-9, 9, (SIDE, SIDE), device=device, dtype=torch.int8) for _ in range(2))
        int8 = flop / _best(lambda: torch._int_mm(ia, ib), device)
    source, target = (torch.empty(COPIED, dtype=torch.uint8, device=device) for _ in range(2))
    bandwidth = 2 * COPIED / _best(lambda: target.copy_(source), device)
    pinned = torch.empty(COPIED, dtype=torch.uint8, pin_memory=True)
    link = COPIED / _best(lambda: target.copy_(pinned, non_blocking=True), device)
    return Card(
        name=name,
        memory=memory,
        bandwidth=bandwidth,
        bf16=bf16,
        fp8=fp8,
        int8=int8,
        link=link,
        source=f"measured here, products of {SIDE}×{SIDE}",
    )


def _best(run: Callable[[], object], device: torch.device, *, repeats: int = 8) -> float:
    """Seconds of the quickest of some runs after two others."""
    best = float("inf")
    for i in range(repeats + 2):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        run()
        torch.cuda.synchronize(device)
        if i >= 2:
            best = min(best, time.perf_counter() - start)
    return best
