"""The two FP8 formats, as data.

Source: Micikevicius et al. 2022, FP8 formats for deep learning (arXiv 2209.05433). e4m3fn gives up infinity for range:
only the code with all bits set, of either sign, is not a number. e5m2 follows IEEE 754.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Fp8Format:
    """One format; values are those of positive numbers."""

    name: str  # as torch has it, without `float8_`
    dtype: torch.dtype
    mantissa_bits: int
    max: float  # largest finite value
    smallest_normal: float
    smallest: float  # subnormal; also the spacing of values below smallest_normal
    first_non_finite_code: int  # this byte and all above it, sign bit taken off, are NaN or infinity


E4M3FN = Fp8Format("e4m3fn", torch.float8_e4m3fn, 3, 448.0, 2.0**-6, 2.0**-9, 0x7F)
E5M2 = Fp8Format("e5m2", torch.float8_e5m2, 2, 57344.0, 2.0**-14, 2.0**-16, 0x7C)

FORMATS: Mapping[torch.dtype, Fp8Format] = {fmt.dtype: fmt for fmt in (E4M3FN, E5M2)}


def all_finite_codes(q: torch.Tensor) -> bool:
    """Whether the FP8 tensor `q` holds neither NaN nor infinity."""
    if q.numel() == 0:
        return True
    # As signed bytes positive numbers are the largest, as unsigned ones negative numbers. Masking the sign off would
    # take memory of q's size, which loading cannot spare.
    limit = FORMATS[q.dtype].first_non_finite_code
    return int(q.view(torch.int8).amax()) < limit and int(q.view(torch.uint8).amax()) < 0x80 + limit
