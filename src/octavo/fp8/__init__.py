"""Numbers of eight bits: the formats, scaling into and out of them, the linear layer that keeps its weight so, and the
ways to multiply by it. Start reading at `scale`, then `linear`; `prepare` settles how a loaded model multiplies."""

from octavo.fp8.backends import Backend, Choice, choose_backend, find_backend
from octavo.fp8.finite import all_finite, watch
from octavo.fp8.formats import E4M3FN, E5M2, FORMATS, Fp8Format
from octavo.fp8.fused import FusedPaths, fuse, fused_paths
from octavo.fp8.linear import Fp8Linear, LinearSpec
from octavo.fp8.matmul import BACKENDS
from octavo.fp8.needs import Mode, Problem
from octavo.fp8.prepare import Paths, paths, prepare, refused
from octavo.fp8.scale import Granularity, Scaled, dequantize, quantize
from octavo.fp8.steps import at_sigmas, step_group
from octavo.fp8.survey import survey

__all__ = [
    "BACKENDS",
    "E4M3FN",
    "E5M2",
    "FORMATS",
    "Backend",
    "Choice",
    "Fp8Format",
    "Fp8Linear",
    "FusedPaths",
    "Granularity",
    "LinearSpec",
    "Mode",
    "Paths",
    "Problem",
    "Scaled",
    "all_finite",
    "at_sigmas",
    "choose_backend",
    "dequantize",
    "find_backend",
    "fuse",
    "fused_paths",
    "paths",
    "prepare",
    "quantize",
    "refused",
    "step_group",
    "survey",
    "watch",
]
