"""Which layers of a model keep their weights in FP8, and how they get there.

`recipe` says what shall become of each layer, `layers.quantize_layer` does it to one, `convert` puts FP8 layers into a
model. What the inputs are like is seen by `observe`; whole checkpoints are the business of `compress`.
"""

from octavo.quantize.convert import apply, convert
from octavo.quantize.layer import QuantizedLayer
from octavo.quantize.layers import quantize_layer
from octavo.quantize.observe import InputStatistics, Observer
from octavo.quantize.recipe import LayerRule, Recipe, load_recipe, read_recipe, recipe_names
from octavo.quantize.sensitivity import Sensitivity, choose_kept

__all__ = [
    "InputStatistics",
    "LayerRule",
    "Observer",
    "QuantizedLayer",
    "Recipe",
    "Sensitivity",
    "apply",
    "choose_kept",
    "convert",
    "load_recipe",
    "quantize_layer",
    "read_recipe",
    "recipe_names",
]
