"""Recipes: which layers of a model become FP8, and how, as data.

A recipe is a TOML file: a name, a rule for all linear layers, and rules for those that match a pattern, later ones laid
over earlier ones. `octavo recipes` shows those that come with the package (`recipes/*.toml`).
"""

import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, get_args

from octavo.errors import RecipeError, did_you_mean
from octavo.fp8.formats import E4M3FN, E5M2, Fp8Format
from octavo.fp8.scale import BLOCK, Block, Granularity

FORMATS: Mapping[str, Fp8Format] = {fmt.name: fmt for fmt in (E4M3FN, E5M2)}

ScaleChoice = Literal["one", "amax", "mse"]
InputScaleChoice = Literal["one", "amax", "percentile", "mse"]
Rounding = Literal["nearest", "gptq"]
InputRounding = Literal["dynamic", "static", "exact"]
Statistic = Literal["covariance", "range"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRule:
    """How one linear layer is quantized."""

    keep: bool = False  # stays in 16 bits, whatever else is said
    format: str = "e4m3fn"  # of the weight; or e5m2
    granularity: Granularity = "row"  # what shares a scale of the weight: tensor, row, block
    block: Block = BLOCK  # rows and columns that do, where it is a block
    scale: ScaleChoice = "amax"  # of the weight: 1, the largest value's, or the one of least error
    rounding: Rounding = "nearest"  # of the weight; "gptq" lets later columns make up for earlier ones
    damping: float = 0.05  # of GPTQ, relative to the inputs' mean squares
    input: InputRounding = "dynamic"  # at run time: a scale for each row, a calibrated one, or never rounded
    input_scale: InputScaleChoice = "mse"  # which one, where `input` is static
    input_steps: bool = False  # a static scale for each part of the schedule, for inputs that drift over it
    low_rank: int = 0  # rank of a branch in 16 bits that carries what the weight's largest directions do

    @property
    def fp8_format(self) -> Fp8Format:
        """The format as `fp8` has it."""
        return FORMATS[self.format]

    @property
    def statistics(self) -> frozenset[Statistic]:
        """What has to be known of the layer's input."""
        needed: set[Statistic] = set()
        if not self.keep:
            if self.rounding == "gptq":
                needed.add("covariance")
            calibrated = self.input == "static" and (self.input_steps or self.input_scale != "one")
            if self.low_rank or self.scale == "mse" or calibrated:
                needed.add("range")
        return frozenset(needed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a model is quantized.

    Attributes:
        name: by which it is called.
        description: a sentence for people.
        default: the rule of a linear layer that no pattern names.
        rules: patterns of layer names with what they change, in order; `*` stands for anything.
        equalize: move outliers between neighbouring layers first, see `seams`.
        min_psnr: dB that pictures must reach against the 16-bit model's, or None.
        step_sigmas: falling noise levels between the parts of the schedule that it is calibrated on; not in the file.
    """

    name: str
    description: str = ""
    default: LayerRule = LayerRule()
    rules: tuple[tuple[tuple[str, ...], Mapping[str, Any]], ...] = ()
    equalize: bool = False
    min_psnr: float | None = None
    step_sigmas: tuple[float, ...] = ()

    def rule(self, layer: str) -> LayerRule:
        """The rule of `layer`, named as in our MMDiT: `joint_blocks.3.x_block.mlp.fc2`."""
        rule = self.default
        for patterns, changes in self.rules:
            if any(fnmatchcase(layer, pattern) for pattern in patterns):
                rule = replace(rule, **changes)
        if rule.input_steps and rule.input != "static" and not rule.keep:
            raise RecipeError(
                f"The recipe '{self.name}' has input_steps for '{layer}', whose input is {rule.input}: only static "
                'scales can follow the schedule. Write input = "static" there, or input_steps = false.'
            )
        return rule

    def with_kept(self, layers: Collection[str]) -> "Recipe":
        """The same, with these layers in 16 bits too."""
        return replace(self, rules=(*self.rules, (tuple(sorted(layers)), {"keep": True}))) if layers else self

    @property
    def needs_calibration(self) -> bool:
        """Whether any layer could need to know its inputs."""
        every = [self.default, *(replace(self.default, **changes) for _, changes in self.rules)]
        return self.equalize or any(rule.statistics for rule in every)

    def to_toml(self) -> str:
        """The recipe as a file that `read_recipe` reads back."""
        lines = [f"name = {_toml(self.name)}", f"description = {_toml(self.description)}"]
        if self.equalize:
            lines.append("equalize = true")
        if self.min_psnr is not None:
            lines.append(f"min_psnr = {_toml(self.min_psnr)}")
        plain = LayerRule()
        changed = {f.name: getattr(self.default, f.name) for f in fields(LayerRule)}
        lines += ["", "[default]"]
        lines += [f"{name} = {_toml(value)}" for name, value in changed.items() if value != getattr(plain, name)]
        for patterns, changes in self.rules:
            lines += ["", "[[rules]]", f"layers = {_toml(list(patterns))}"]
            lines += [f"{name} = {_toml(value)}" for name, value in changes.items()]
        return "\n".join(lines) + "\n"


@cache
def recipe_names() -> tuple[str, ...]:
    """Names of the recipes in the package."""
    inside = files("octavo.quantize") / "recipes"
    return tuple(sorted(file.name.removesuffix(".toml") for file in inside.iterdir() if file.name.endswith(".toml")))


def load_recipe(name: str) -> Recipe:
    """The recipe of the package with this name, or the one in the file at this path.

    Raises:
        RecipeError: there is none, or it says what no recipe can.
    """
    if name in recipe_names():
        return read_recipe((files("octavo.quantize") / "recipes" / f"{name}.toml").read_text("utf-8"), f"recipe {name}")
    path = Path(name)
    if path.suffix != ".toml" and not path.exists():
        raise RecipeError(
            f"There is no recipe '{name}'; there are {', '.join(recipe_names())}, or the path of a .toml file. "
            "'octavo recipes' shows them."
        )
    try:
        return read_recipe(path.read_text("utf-8"), f"'{path}'")
    except (OSError, UnicodeError) as error:
        raise RecipeError(f"The recipe '{path}' cannot be read: {error}.") from error


def read_recipe(text: str, where: str) -> Recipe:
    """The recipe that TOML text says.

    Args:
        text: of the file.
        where: what to call it in messages.

    Raises:
        RecipeError: it is not TOML, or has an unknown key or value.
    """
    try:
        said = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{where} is not TOML: {error}.") from error
    known = ("name", "description", "default", "rules", "equalize", "min_psnr")
    _refuse_unknown(said, known, where)
    default = _changes(said.get("default", {}), f"{where}, [default]")
    rules = said.get("rules", [])
    if not isinstance(rules, list):
        raise RecipeError(f"{where}: write [[rules]], with two brackets, once for each rule.")
    read_rules = []
    for number, rule in enumerate(rules, 1):
        spot = f"{where}, rule {number}"
        if not isinstance(rule, dict):
            raise RecipeError(f"{spot} is not a table. Write [[rules]] and its keys below.")
        patterns = rule.get("layers")
        if not isinstance(patterns, list) or not patterns or not all(isinstance(p, str) for p in patterns):
            raise RecipeError(f'{spot} needs layers = ["pattern", …], such as ["*.mlp.fc2"].')
        read_rules.append((tuple(patterns), _changes({k: v for k, v in rule.items() if k != "layers"}, spot)))
    return Recipe(
        name=_of_type(said.get("name", where), str, "name", where),
        description=_of_type(said.get("description", ""), str, "description", where),
        default=replace(LayerRule(), **default),
        rules=tuple(read_rules),
        equalize=_of_type(said.get("equalize", False), bool, "equalize", where),
        min_psnr=None if "min_psnr" not in said else float(_of_type(said["min_psnr"], (int, float), "min_psnr", where)),
    )


def _changes(said: object, where: str) -> dict[str, Any]:
    if not isinstance(said, dict):
        raise RecipeError(f"{where} is not a table of settings.")
    kinds: dict[str, Any] = {
        "keep": bool,
        "format": tuple(FORMATS),
        "granularity": get_args(Granularity),
        "block": list,
        "scale": get_args(ScaleChoice),
        "rounding": get_args(Rounding),
        "damping": float,
        "input": get_args(InputRounding),
        "input_scale": get_args(InputScaleChoice),
        "input_steps": bool,
        "low_rank": int,
    }
    _refuse_unknown(said, tuple(kinds), where)
    changes: dict[str, Any] = {}
    for name, value in said.items():
        kind = kinds[name]
        if isinstance(kind, tuple):
            if value not in kind:
                raise RecipeError(f"{where}: {name} = {value!r}; it is one of {', '.join(kind)}.")
            changes[name] = value
        elif kind is list:
            if not (isinstance(value, list) and len(value) == 2 and all(type(n) is int and n > 0 for n in value)):
                raise RecipeError(f"{where}: {name} = {value!r}; write two sizes from 1 up, such as [128, 128].")
            changes[name] = tuple(value)
        elif kind is bool:
            changes[name] = _of_type(value, bool, name, where)
        else:
            number = _of_type(value, (int, float) if kind is float else int, name, where)
            if number < 0:
                raise RecipeError(f"{where}: {name} = {value!r}; it cannot be negative.")
            changes[name] = kind(number)
    return changes


def _of_type(value: Any, kind: Any, name: str, where: str) -> Any:
    # TOML's true is no number, though Python's is.
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        wanted = {bool: "true or false", str: "text", int: "a whole number"}.get(kind, "a number")
        raise RecipeError(f"{where}: {name} = {value!r}; write {wanted}.")
    return value


def _refuse_unknown(said: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    for key in said:
        if key not in known:
            raise RecipeError(
                f"{where} has the key '{key}', which it cannot have.{did_you_mean(key, known)} There are "
                f"{', '.join(known)}."
            )


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t")
        return f'"{escaped}"'
    return repr(value)
