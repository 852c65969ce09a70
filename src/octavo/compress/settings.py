"""What may be asked of `octavo quantize`, checked once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from octavo.checkpoint.quantized import OutputForm
from octavo.errors import RequestError
from octavo.quantize import Recipe, load_recipe

FileForm = Literal["octavo", "comfyui", "both"]
DEFAULT_RECIPE, COMFY_RECIPE = "best", "comfy"


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeSettings:
    """How a checkpoint is quantized. `None` asks for what suits the model."""

    recipe: str | None = None  # name or path of a .toml file
    form: FileForm = "octavo"  # of the file; both: a second one for ComfyUI beside it
    prompts: Path | None = None  # to calibrate on, one a line; built-in ones if not given
    calibration_size: int = 128  # prompts
    steps: int | None = None  # of the calibration's runs and of the gate's pictures, as all up to `seed`
    guidance_scale: float | None = None
    width: int | None = None  # pixels
    height: int | None = None  # pixels
    seed: int = 0
    model: str | None = None  # that a ControlNet steers, for its calibration and its gate; the embedded one if it fits
    text_encoders: tuple[str, ...] = ()  # to use instead of those found with the model
    vae: str | None = None
    models_dir: Path | None = None
    device: str | None = None
    dtype: str | None = None  # of the calibration's arithmetic
    budget: int | None = None  # bytes that the file may have; layers that gain most stay in 16 bits
    keep_16bit: float | None = None  # share of the linear weights that stays in 16 bits
    sensitivity: Path | None = None  # measured before, or where to put what is measured now
    min_psnr: float | None = None  # dB that the gate asks for; the recipe's own bound if not given
    gate: int | None = None  # pictures that the gate draws; 0 is none
    finetune: int = 0  # steps of training after the calibration
    low_memory: bool = False  # never keep the whole model in memory, even where there is room
    work: Path | None = None  # folder for unfinished work, kept; beside the file, and removed, if not given
    force: bool = False  # replace files that are there, and keep those that fail the gate

    def __post_init__(self) -> None:
        if self.form not in get_args(FileForm):
            raise RequestError(f"There is no file format '{self.form}'; use {', '.join(get_args(FileForm))}.")
        if self.calibration_size < 1:
            raise RequestError(f"calibration_size {self.calibration_size}: at least one prompt is needed.")
        if self.budget is not None and self.keep_16bit is not None:
            raise RequestError("A budget in bytes and a share to keep in 16 bits are both given; give one of them.")
        if self.keep_16bit is not None and not 0 <= self.keep_16bit <= 1:
            raise RequestError(f"keep_16bit {self.keep_16bit} is no share from 0 to 1.")
        if self.gate is not None and self.gate < 0:
            raise RequestError(f"gate {self.gate}: the number of pictures cannot be negative; 0 is none.")
        if self.gate == 0 and self.min_psnr is not None:
            raise RequestError("min_psnr asks for a gate and gate 0 for none; leave one of them out.")
        if self.finetune < 0:
            raise RequestError(f"finetune {self.finetune}: the number of steps cannot be negative; 0 is none.")
        if self.finetune and self.form == "comfyui":
            raise RequestError("ComfyUI's form has nothing to fine-tune; write format octavo, or both.")

    def recipes(self) -> list[tuple[OutputForm, Recipe]]:
        """The recipe for each file that is to be written.

        Raises:
            RecipeError: there is no such recipe, or it says what no recipe can.
        """
        asked = None if self.recipe is None else load_recipe(self.recipe)
        if self.form == "comfyui":
            return [("comfyui", asked or load_recipe(COMFY_RECIPE))]
        files: list[tuple[OutputForm, Recipe]] = [("octavo", asked or load_recipe(DEFAULT_RECIPE))]
        if self.form == "both":
            fits = asked is not None and readable_by_comfyui(asked)
            files.append(("comfyui", asked if asked is not None and fits else load_recipe(COMFY_RECIPE)))
        return files

    @property
    def wants_sensitivity(self) -> bool:
        """Whether layers are chosen to stay in 16 bits."""
        return self.budget is not None or self.keep_16bit is not None

    @property
    def must_measure(self) -> bool:
        """Whether that has to be measured first."""
        return self.wants_sensitivity and (self.sensitivity is None or not self.sensitivity.exists())


def readable_by_comfyui(recipe: Recipe) -> bool:
    """Whether all layers of a recipe have one scale, one for the input, and no low-rank branch."""
    rules = [recipe.default, *(recipe.rule(pattern) for patterns, _ in recipe.rules for pattern in patterns)]
    return all(
        rule.keep or (rule.granularity == "tensor" and not rule.low_rank and not rule.input_steps) for rule in rules
    )
