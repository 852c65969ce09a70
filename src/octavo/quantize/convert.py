"""A model and a table of layers → the same model with FP8 layers in their places.

Works on the meta device, before anything is loaded, so that a model larger than memory can be prepared; weights that
are there already are quantized.
"""

from collections.abc import Mapping

import torch
from torch import nn

from octavo.fp8.formats import FORMATS
from octavo.fp8.linear import Fp8Linear, LinearSpec
from octavo.fp8.scale import BLOCK, quantize
from octavo.quantize.layer import QuantizedLayer


def convert(model: nn.Module, specs: Mapping[str, LinearSpec]) -> None:
    """Replace linear layers of `model`, in place.

    Args:
        model: on any device; on meta the new layers are empty too.
        specs: module names, such as `joint_blocks.0.x_block.mlp.fc1`, and how each shall keep its weight.
    """
    for name, spec in specs.items():
        linear = _linear(model, name)
        model.set_submodule(name, _in_fp8(linear, spec), strict=True)


def apply(model: nn.Module, layers: Mapping[str, QuantizedLayer]) -> None:
    """Put quantized layers into a loaded `model`, in place; `fp8.prepare` has to be called afterwards."""
    for name, layer in layers.items():
        linear = _linear(model, name)
        block = layer.weight.block
        spec = LinearSpec(
            format=FORMATS[layer.weight.q.dtype],
            granularity="block" if block else "row" if layer.weight.scale.ndim else "tensor",
            block=block or BLOCK,
            input_scale=layer.input_scale is not None,
            step_sigmas=layer.step_sigmas,
            full_precision=layer.full_precision,
        )
        new = _empty(linear, spec)
        new.q, new.scale, new.input_scale = layer.weight.q, layer.weight.scale, layer.input_scale
        if layer.bias is not None:
            new.bias = nn.Parameter(layer.bias.detach().to(linear.weight.dtype), requires_grad=False)
        if layer.low_rank is not None:
            down, up = (factor.detach().to(linear.weight.dtype) for factor in layer.low_rank)
            new.set_low_rank(down, up)
        model.set_submodule(name, new, strict=True)


def _linear(model: nn.Module, name: str) -> nn.Linear:
    linear = model.get_submodule(name)
    assert isinstance(linear, nn.Linear), f"'{name}' is not a linear layer but a {type(linear).__name__}"
    return linear


def _empty(linear: nn.Linear, spec: LinearSpec) -> Fp8Linear:
    weight = linear.weight
    return Fp8Linear(
        linear.in_features,
        linear.out_features,
        spec,
        bias=linear.bias is not None,
        device=weight.device,
        dtype=weight.dtype,
    )


def _in_fp8(linear: nn.Linear, spec: LinearSpec) -> Fp8Linear:
    new = _empty(linear, spec)
    if not linear.weight.is_meta:
        scaled = quantize(linear.weight.detach(), spec.format, spec.granularity, block=spec.block)
        new.q, new.scale = scaled.q, scaled.scale
        if linear.bias is not None:
            assert new.bias is not None
            with torch.no_grad():
                new.bias.copy_(linear.bias)
    return new
