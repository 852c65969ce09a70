"""FP8 at load: linear layers that a file keeps in 16 bits are quantized one by one as they are read.

    plan = plan_part(source.require("mmdit"))
    force_fp8(plan)                               # headers only: which layers, and how
    model = load_part(plan, device, dtype)        # never holds more than one of them in 16 bits

This is the plain cast by row, without calibration. `octavo quantize` makes better files, once and for all.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from octavo.checkpoint.kinds import Kind
from octavo.checkpoint.plan import Origin, Plan
from octavo.checkpoint.tensors import torch_dtype
from octavo.devices import trim_memory
from octavo.fp8 import Fp8Linear, LinearSpec, quantize
from octavo.fp8.scale import amax, scale_from_amax
from octavo.quantize import convert

BY_ROW = LinearSpec(granularity="row")
TRIM_AFTER = 4 << 20  # bytes of a weight whose temporary numbers are worth giving back
ROWS_AT_ONCE = 256  # of a weight, in float32 meanwhile

# Linear layers that stay as they are: few weights, through which everything goes. Measured, see decision 0009.
KEPT: Mapping[Kind, tuple[str, ...]] = {
    "mmdit": ("final_layer.linear",),
    "clip_l": ("text_projection",),
    "clip_g": ("text_projection",),
}

# Layers whose input is never rounded: called once a run or a step, for few rows, so that exactness costs no time.
EXACT: Mapping[Kind, tuple[str, ...]] = {
    "mmdit": ("*adaLN_modulation*", "t_embedder.*", "y_embedder.*", "context_embedder"),
    "controlnet": ("*adaLN_modulation*", "t_embedder.*", "y_embedder.*", "context_embedder"),
}


def force_fp8(plan: Plan, spec: LinearSpec = BY_ROW) -> tuple[str, ...]:
    """Let linear layers become FP8 by `spec` that the file keeps otherwise; those in FP8 already stay as they are.

    Args:
        plan: changed in place.
        spec: format and granularity.

    Returns:
        Names of the layers that will be quantized.
    """
    specs = forced_specs(plan.linears, plan.located.part.kind, spec)
    forced = {name: s for name, s in specs.items() if not isinstance(plan.model.get_submodule(name), Fp8Linear)}
    convert(plan.model, forced)
    return tuple(forced)


def forced_specs(linears: Iterable[str], kind: Kind, spec: LinearSpec = BY_ROW) -> dict[str, LinearSpec]:
    """How each of the linear layers of a model of this kind becomes FP8; those that stay as they are left out."""
    kept, exact = KEPT.get(kind, ()), EXACT.get(kind, ())
    return {
        name: replace(spec, full_precision=spec.full_precision or any(fnmatchcase(name, one) for one in exact))
        for name in linears
        if not any(fnmatchcase(name, one) for one in kept)
    }


def buffer_for(layer: Fp8Linear, origin: Origin, device: torch.device | str) -> Tensor:
    """Room for the layer's weight [N, K] as the file has it, 16-bit where it can be."""
    dtypes = {torch_dtype(slab.entry) if slab.rule is None else torch.float32 for slab in origin.slabs}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    return torch.empty(layer.q.shape, dtype=dtype, device=device)


def quantize_into(layer: Fp8Linear, weight: Tensor) -> None:
    """Give `layer` its weight [N, K]: as `quantize` would, some rows at a time, since float32 takes much room."""
    fmt, by_row = layer.spec.format, layer.spec.granularity == "row"
    blocks = [slice(start, start + ROWS_AT_ONCE) for start in range(0, len(weight), ROWS_AT_ONCE)]
    largest = torch.cat([amax(weight[block], "row") for block in blocks])
    scale = scale_from_amax(largest if by_row else largest.amax(), fmt)
    q = torch.empty(weight.shape, dtype=fmt.dtype, device=weight.device)
    for block in blocks:
        q[block] = quantize(weight[block], fmt, scale=scale[block] if by_row else scale).q
    layer.q, layer.scale = q, scale
    if weight.nbytes >= TRIM_AFTER:
        trim_memory()
