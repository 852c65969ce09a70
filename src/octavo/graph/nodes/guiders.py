"""Nodes that say what a run is guided by, and what noise it starts from; `sampling` walks it."""

from octavo.graph.context import Context
from octavo.graph.nodes.types import Conditions, Guider, ModelLink, Noise
from octavo.graph.spec import FLOAT, INT, LINK, NodeSpec, node
from octavo.pipeline.request import MAX_SEED

_MODULE = "comfy_extras.nodes_custom_sampler"
_GUIDERS = "sampling/custom_sampling/guiders"
_NOISE = "sampling/custom_sampling/noise"


@node(
    "CFGGuider",
    module=_MODULE,
    category=_GUIDERS,
    description="Classifier-free guidance: away from the negative, past the positive. At cfg 1 the negative is not "
    "looked at.",
    inputs={
        "model": LINK("MODEL"),
        "positive": LINK("CONDITIONING"),
        "negative": LINK("CONDITIONING"),
        "cfg": FLOAT(8.0, min=0.0, max=100.0, step=0.1, round=0.01),
    },
    outputs=("GUIDER",),
)
def cfg_guider(
    _context: Context, model: ModelLink, positive: Conditions, negative: Conditions, cfg: float
) -> tuple[Guider]:
    """Two sides and a scale."""
    return (Guider(model=model, positive=positive, negative=negative, scale=cfg),)


@node(
    "BasicGuider",
    module=_MODULE,
    category=_GUIDERS,
    description="No guidance: the model's answers as they are.",
    inputs={"model": LINK("MODEL"), "conditioning": LINK("CONDITIONING")},
    outputs=("GUIDER",),
)
def basic_guider(_context: Context, model: ModelLink, conditioning: Conditions) -> tuple[Guider]:
    """One side."""
    return (Guider(model=model, positive=conditioning, negative=None, scale=1.0),)


@node(
    "RandomNoise",
    module=_MODULE,
    category=_NOISE,
    description="The noise that belongs to a seed.",
    inputs={"noise_seed": INT(0, min=0, max=MAX_SEED, control_after_generate=True)},
    outputs=("NOISE",),
)
def random_noise(_context: Context, noise_seed: int) -> tuple[Noise]:
    """Drawn by the sampler, which knows the shape."""
    return (Noise(seed=noise_seed),)


@node(
    "DisableNoise",
    module=_MODULE,
    category=_NOISE,
    description="No noise at the start, for latents that hold some already.",
    inputs={},
    outputs=("NOISE",),
    search_aliases=("zero noise",),
)
def disable_noise(_context: Context) -> tuple[Noise]:
    """Zeros; noise that a sampler draws on its way has the seed 0."""
    return (Noise(seed=0, silent=True),)


NODES: tuple[NodeSpec, ...] = (cfg_guider, basic_guider, random_noise, disable_noise)
