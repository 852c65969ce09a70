"""Numbers of eight bits: the formats, scaling into and out of them, and the linear layer that keeps its weight so."""

from octavo.fp8.formats import E4M3FN, E5M2, FORMATS, Fp8Format
from octavo.fp8.linear import Fp8Linear, LinearSpec
from octavo.fp8.scale import Granularity, Scaled, dequantize, quantize

__all__ = [
    "E4M3FN",
    "E5M2",
    "FORMATS",
    "Fp8Format",
    "Fp8Linear",
    "Granularity",
    "LinearSpec",
    "Scaled",
    "dequantize",
    "quantize",
]
