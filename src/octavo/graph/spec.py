"""How a node is declared: its name, what goes in, what comes out, and the function that does the work.

    @node(
        "RepeatLatentBatch",
        category="latent/batch",
        inputs={"samples": LINK("LATENT"), "amount": INT(1, min=1, max=64)},
        outputs=("LATENT",),
    )
    def repeat_latent_batch(context: Context, samples: Latent, amount: int) -> tuple[Latent]: ...

A declaration is data. `NodeSpec.object_info` turns it into ComfyUI's entry of `/object_info`, field by field, and
`graph.workflow` checks prompts against it. ComfyUI describes its nodes in one of two ways: `classic`, where a list of
choices is `[["a", "b"], {}]`, and `schema`, where it is `["COMBO", {"options": [...]}]` and every input has options.
A node says which by `module`: the classic ones live in `"nodes"`, and one elsewhere that is classic says so.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from octavo.graph.places import Folders


class Lists(Folders, Protocol):
    """What is there to choose from: names of files by category, and the folders that pictures are read from."""

    def names(self, category: str) -> Sequence[str]:
        """Sorted names: `checkpoints`, `diffusion_models`, `text_encoders`, `vae`, `loras`, `controlnet`,
        `embeddings`, `upscale_models`, or `input`, the pictures in the input folder. Nothing for others."""
        ...


Choices = tuple[str, ...] | Callable[[Lists], Sequence[str]]
Check = Callable[[Any, Lists], str | None]
Section = Literal["required", "optional", "hidden"]
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """One input of a node; made by the functions in capitals below."""

    type: str  # "INT", "COMBO", "MODEL", …; "*" takes any
    options: Mapping[str, Any] = field(default_factory=dict)  # as `/object_info` shows them
    choices: Choices | None = None  # of a COMBO; None where the web page asks for them elsewhere
    check: Check | None = None  # takes the place of "is it in the list?"; gives a complaint, or None
    section: Section = "required"
    added_later: bool = False  # ComfyUI's node once lacked it: a prompt without it gets the default

    @property
    def is_widget(self) -> bool:
        """Whether the value is typed in by the user rather than come from another node."""
        return self.type in WIDGETS

    @property
    def optional(self) -> "Input":
        """The same input, which may be left out."""
        return replace(self, section="optional")

    def choose_from(self, lists: Lists) -> list[str]:
        """The names that a COMBO offers now."""
        return list(self.choices(lists) if callable(self.choices) else self.choices or ())

    def default(self, lists: Lists) -> Any:
        """What the value is when nobody says it; None where there is no such thing."""
        if "default" in self.options:
            return self.options["default"]
        if self.type == "COMBO":
            return next(iter(self.choose_from(lists)), None)
        return {"INT": 0, "FLOAT": 0.0, "STRING": "", "BOOLEAN": False}.get(self.type)

    def object_info(self, lists: Lists, *, classic: bool) -> Any:
        """The input as `/object_info` tells it."""
        if self.section == "hidden":
            return self.type
        options = dict(self.options)
        if self.choices is not None:
            if not classic:
                return ["COMBO", {"multiselect": False, **options, "options": self.choose_from(lists)}]
            return [self.choose_from(lists), options] if options else [self.choose_from(lists)]
        return [self.type, options] if options or not classic else [self.type]


def INT(default: int | None = None, /, *, added_later: bool = False, **options: Any) -> Input:  # noqa: N802
    """A whole number. Options as ComfyUI names them: min, max, step, display, control_after_generate, tooltip."""
    return Input(type="INT", options=_with_default(default, options), added_later=added_later)


def FLOAT(default: float | None = None, /, *, added_later: bool = False, **options: Any) -> Input:  # noqa: N802
    """A number. Options: min, max, step, round, tooltip."""
    return Input(type="FLOAT", options=_with_default(default, options), added_later=added_later)


def STRING(default: str | None = None, /, *, added_later: bool = False, **options: Any) -> Input:  # noqa: N802
    """A text. Options: multiline, dynamicPrompts, tooltip."""
    return Input(type="STRING", options=_with_default(default, options), added_later=added_later)


def BOOLEAN(default: bool | None = None, /, *, added_later: bool = False, **options: Any) -> Input:  # noqa: N802
    """Yes or no."""
    return Input(type="BOOLEAN", options=_with_default(default, options), added_later=added_later)


def COMBO(  # noqa: N802
    choices: Choices | None, *, check: Check | None = None, added_later: bool = False, **options: Any
) -> Input:
    """One name out of a list; `files("checkpoints")` for the names of files that are there.

    `check` decides instead of the list whether a value will do: it is given the value and the `Lists`, and returns
    None or a complaint such as `"Invalid image file: x.png"`.
    """
    return Input(type="COMBO", options=options, choices=choices, check=check, added_later=added_later)


def LINK(type: str, /, **options: Any) -> Input:  # noqa: N802
    """What comes from another node: `LINK("MODEL")`; `LINK("*")` takes anything, `LINK("INT,FLOAT")` either."""
    return Input(type=type, options=options)


def HIDDEN(type: str, /) -> Input:  # noqa: N802
    """What ComfyUI hands to its nodes unasked ("PROMPT", "EXTRA_PNGINFO", "UNIQUE_ID").

    It is shown in `/object_info` only; our nodes find it in their `Context` and have no such argument.
    """
    return Input(type=type, section="hidden")


def files(category: str) -> Choices:
    """The choices of a COMBO that lists files; see `Lists.names`."""
    return lambda lists: lists.names(category)


def _with_default(default: Any, options: dict[str, Any]) -> dict[str, Any]:
    return options if default is None else {"default": default, **options}


@dataclass(frozen=True, slots=True)
class NodeResult:
    """What a node gives when it also has something to show."""

    outputs: tuple[Any, ...] = ()
    ui: Mapping[str, Sequence[Any]] = field(default_factory=dict)  # {"images": [{"filename", "subfolder", "type"}]}


Run = Callable[..., tuple[Any, ...] | NodeResult]
"""`run(context, **inputs)`; the context is a `graph.context.Context`, an optional input that is not given is absent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSpec:
    """A node as a workflow names it. Made by `node`, below."""

    name: str
    category: str
    inputs: Mapping[str, Input]  # in order
    outputs: tuple[str | tuple[str, str], ...]  # types, or (type, name) where the name is another
    run: Run
    display_name: str | None = None
    description: str = ""
    module: str = "nodes"  # ComfyUI's name of the place it lives in; the web frontend sorts nodes by it
    classic: bool = True
    output_node: bool = False  # it is run for what it does; what feeds no output node is not run
    output_is_list: tuple[bool, ...] = ()  # outputs that are lists, whose items go to the next node one by one
    input_is_list: bool = False  # it wants all items of its inputs at once, each input a list
    output_tooltips: tuple[str, ...] = ()
    search_aliases: tuple[str, ...] = ()
    deprecated: bool = False
    experimental: bool = False
    listed: bool = True  # in /object_info; the web page makes some nodes itself, which no list of ours may name
    is_changed: Callable[..., object] | None = None
    # `is_changed(context, **inputs)` gives what a result depends on beside its inputs, such as the hash of a file; its
    # repr goes into the signature that the cache goes by. Linked inputs are None. A plain object() is new each time.

    @property
    def output_types(self) -> tuple[str, ...]:
        """Type of each output."""
        return tuple(output if isinstance(output, str) else output[0] for output in self.outputs)

    @property
    def output_names(self) -> tuple[str, ...]:
        """Name of each output."""
        return tuple(output if isinstance(output, str) else output[1] for output in self.outputs)

    @property
    def list_outputs(self) -> tuple[bool, ...]:
        """Whether each output is a list."""
        return self.output_is_list or (False,) * len(self.outputs)

    def object_info(self, lists: Lists) -> dict[str, Any]:
        """The node's entry of ComfyUI's `/object_info`.

        Args:
            lists: fills the COMBOs whose names depend on what files there are.
        """
        inputs: dict[str, dict[str, Any]] = {"required": {}}
        for name, given in self.inputs.items():
            inputs.setdefault(given.section, {})[name] = given.object_info(lists, classic=self.classic)
        inputs = {section: inputs[section] for section in ("required", "optional", "hidden") if section in inputs}
        entry: dict[str, Any] = {
            "input": inputs,
            "input_order": {section: list(names) for section, names in inputs.items()},
            "is_input_list": self.input_is_list,
            "output": list(self.output_types),
            "output_is_list": list(self.list_outputs),
            "output_name": list(self.output_names),
        }
        about = {
            "name": self.name,
            "display_name": self.display_name or (self.name if self.classic else None),
            "description": self.description,
            "python_module": self.module,
            "category": self.category,
            "output_node": self.output_node,
        }
        if self.classic:
            tooltips = {"output_tooltips": list(self.output_tooltips)} if self.output_tooltips else {}
            marks = {mark: True for mark in ("deprecated", "experimental") if getattr(self, mark)}
            return {**entry, **about, **tooltips, **marks, "search_aliases": list(self.search_aliases)}
        return {
            **entry,
            "output_tooltips": list(self.output_tooltips) or [None] * len(self.outputs),
            "output_matchtypes": None,
            **about,
            "deprecated": self.deprecated,
            "experimental": self.experimental,
            "dev_only": False,
            "api_node": False,
            "price_badge": None,
            "search_aliases": list(self.search_aliases) or None,
        }


def node(
    name: str,
    *,
    category: str,
    inputs: Mapping[str, Input],
    outputs: Sequence[str | tuple[str, str]],
    module: str = "nodes",
    classic: bool | None = None,
    **more: Any,
) -> Callable[[Run], NodeSpec]:
    """Decorator that turns a node's function into its `NodeSpec`; further arguments are fields of that."""

    def declare(run: Run) -> NodeSpec:
        return NodeSpec(
            name=name,
            category=category,
            inputs=dict(inputs),
            outputs=tuple(outputs),
            run=run,
            module=module,
            classic=module == "nodes" if classic is None else classic,
            **more,
        )

    return declare
