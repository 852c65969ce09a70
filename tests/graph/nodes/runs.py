"""Workflows run on a small model: the tree of files, nodes that give recorded things, and one that keeps results."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from octavo.graph.cache import Cache
from octavo.graph.context import Context
from octavo.graph.execute import Executor
from octavo.graph.nodes import NODES
from octavo.graph.nodes.types import Conditions, Latent
from octavo.graph.spec import LINK, STRING, NodeResult, NodeSpec, node
from octavo.graph.workflow import validate
from octavo.pipeline.conditions import Condition
from octavo.pipeline.run import solve
from octavo.pipeline.shelf import LoadSettings, Shelf
from tests.goldens import golden
from tests.graph.compare import FixedLists
from tests.pipeline.recorded import recorded, told
from tests.recipes import mmdit_weights

MODEL = "mmdit_large_tiny.safetensors"


def write_recorded_model(root: Path) -> Path:
    """Put the model of the recorded runs into a models tree; returns `root`."""
    folder = root / "diffusion_models"
    folder.mkdir(parents=True)
    weights = mmdit_weights(golden("comfyui/mmdit_large_tiny.json"))
    save_file({f"model.diffusion_model.{key}": tensor.half() for key, tensor in weights.items()}, folder / MODEL)
    return root


def context_with(models: Path, **more: Any) -> Context:
    """A context whose shelf reads this tree, on the CPU in float32."""
    shelf = Shelf(LoadSettings(models_dir=models, device="cpu", dtype="float32"))
    nowhere = models / "elsewhere"
    folders = {f"{kind}_dir": nowhere / kind for kind in ("input", "output", "temp")}
    return Context(shelf=shelf, solve=more.pop("solve", solve), **folders, **more)


@node("RecordedText", category="", inputs={"name": STRING()}, outputs=("CONDITIONING",))
def recorded_text(_context: Context, name: str) -> tuple[Conditions]:
    """One of the recording's prompts: pos, neg, pos2."""
    return ((Condition(conditioning=told(name)),),)


@node("RecordedLatent", category="", inputs={}, outputs=("LATENT",))
def recorded_latent(_context: Context) -> tuple[Latent]:
    """The recording's picture, as its VAE gave it."""
    return ({"samples": recorded()["in/latent"]},)


@node("RecordedMask", category="", inputs={}, outputs=("MASK",))
def recorded_mask(_context: Context) -> tuple[torch.Tensor]:
    """The recording's mask, in pixels."""
    return (recorded()["in/mask_pixels"],)


@node(
    "PlacedInBatch",
    category="",
    inputs={"samples": LINK("LATENT"), "places": STRING()},
    outputs=("LATENT",),
)
def placed_in_batch(_context: Context, samples: Latent, places: str) -> tuple[Latent]:
    """Latents that say which pictures of their seed they are, such as "3,0"."""
    return ({**samples, "batch_index": [int(place) for place in places.split(",")]},)


@node("Levels", category="", inputs={"levels": STRING()}, outputs=("SIGMAS",))
def levels(_context: Context, levels: str) -> tuple[tuple[float, ...]]:
    """Noise levels as they are written, such as "1, 0.5, 0"."""
    return (tuple(float(level) for level in levels.split(",")),)


@node("Keep", category="", inputs={"value": LINK("*")}, outputs=(), output_node=True)
def keep(_context: Context, value: Any) -> NodeResult:
    """What is wanted of the run."""
    return NodeResult(ui={"value": [value]})


TEST_NODES: Mapping[str, NodeSpec] = {
    spec.name: spec for spec in (recorded_text, recorded_latent, recorded_mask, placed_in_batch, levels, keep)
}


def use(kind: str, **inputs: Any) -> dict[str, Any]:
    """A node of a prompt: `use("KSampler", model=["1", 0], seed=1, …)`."""
    return {"class_type": kind, "inputs": inputs}


def run(
    prompt: Mapping[str, Any], context: Context, emit: Callable[[str, dict[str, Any]], None] = lambda *_: None
) -> dict[str, Any]:
    """Execute a workflow, and give what its Keep nodes were handed, by their ids."""
    nodes = {**NODES, **TEST_NODES}
    lists = FixedLists(**{name: context.shelf.names(name) for name in ("checkpoints", "diffusion_models", "loras")})
    workflow = validate(dict(prompt), nodes, lists)
    shown = Executor(Cache()).run(workflow, context, emit)
    return {id: shown[id]["value"][0] for id in workflow.outputs}
