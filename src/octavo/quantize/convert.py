"""A model and a table of layers → the same model with FP8 layers in their places.

Works on the meta device, before anything is loaded, so that a model larger than memory can be prepared; weights that
are there already are quantized.
"""

from collections.abc import Mapping

import torch
from torch import nn

from octavo.fp8.linear import Fp8Linear, LinearSpec
from octavo.fp8.scale import quantize


def convert(model: nn.Module, specs: Mapping[str, LinearSpec]) -> None:
    """Replace linear layers of `model`, in place.

    Args:
        model: on any device; on meta the new layers are empty too.
        specs: module names, such as `joint_blocks.0.x_block.mlp.fc1`, and how each shall keep its weight.
    """
    for name, spec in specs.items():
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear), f"'{name}' is not a linear layer but a {type(linear).__name__}"
        model.set_submodule(name, _in_fp8(linear, spec), strict=True)


def _in_fp8(linear: nn.Linear, spec: LinearSpec) -> Fp8Linear:
    weight, bias = linear.weight, linear.bias
    new = Fp8Linear(
        linear.in_features,
        linear.out_features,
        spec,
        bias=bias is not None,
        device=weight.device,
        dtype=weight.dtype,
    )
    if not weight.is_meta:
        scaled = quantize(weight.detach(), spec.format, spec.granularity)
        new.q, new.scale = scaled.q, scaled.scale
        if bias is not None:
            assert new.bias is not None
            with torch.no_grad():
                new.bias.copy_(bias)
    return new
