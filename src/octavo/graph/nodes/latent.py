"""Nodes that make latents, or make others of them: size, batch, place.

Sides in the inputs are pixels of the picture, eight to one of a latent. A noise mask and the places in the batch stay
with latents that are scaled, turned or cut, as ComfyUI has it: the mask is fitted to the latents only when they are
sampled, so set it last.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from octavo.errors import RequestError
from octavo.graph.context import Context
from octavo.graph.nodes.limits import check_drawn
from octavo.graph.nodes.types import Latent
from octavo.graph.spec import COMBO, FLOAT, INT, LINK, Input, NodeSpec, node
from octavo.pipeline.latents import CHANNELS, FACTOR
from octavo.pipeline.resize import CROPS, LATENT_METHODS, resize

PLACE = INT(0, min=0, max=16384, step=8)


def _sides(default: int, *, least: int = 16, step: int = 8) -> dict[str, Input]:
    side = INT(default, min=least, max=16384, step=step)
    return {"width": side, "height": side}


# New ones


@node(
    "EmptyLatentImage",
    display_name="Empty Latent Image",
    category="latent",
    description="Zeros to start drawing from, in four channels; a sampler takes as many as its model has.",
    inputs=_sides(512) | {"batch_size": INT(1, min=1, max=4096)},
    outputs=("LATENT",),
    output_tooltips=("Zeros, to be drawn over by a sampler.",),
    search_aliases=("empty", "new latent", "blank"),
)
def empty_latent_image(context: Context, width: int, height: int, batch_size: int) -> tuple[Latent]:
    return (_zeros(context, 4, width, height, batch_size),)


@node(
    "EmptySD3LatentImage",
    category="latent/sd3",
    module="comfy_extras.nodes_sd3",
    description="Zeros to start drawing from, in the sixteen channels of SD3.",
    inputs=_sides(1024, step=16) | {"batch_size": INT(1, min=1, max=4096)},
    outputs=("LATENT",),
)
def empty_sd3_latent_image(context: Context, width: int, height: int, batch_size: int) -> tuple[Latent]:
    return (_zeros(context, CHANNELS, width, height, batch_size),)


def _zeros(context: Context, channels: int, width: int, height: int, batch: int) -> Latent:
    check_drawn(context, width, height, batch)
    return {"samples": torch.zeros(batch, channels, height // FACTOR, width // FACTOR)}


# Size


@node(
    "LatentUpscale",
    display_name="Upscale Latent",
    category="latent",
    description="Scale latents to a size; a side of 0 follows from the other one.",
    inputs={"samples": LINK("LATENT"), "upscale_method": COMBO(LATENT_METHODS)}
    | _sides(512, least=0)
    | {"crop": COMBO(CROPS)},
    outputs=("LATENT",),
    search_aliases=("enlarge latent", "resize latent"),
)
def latent_upscale(
    context: Context, samples: Latent, upscale_method: str, width: int, height: int, crop: str
) -> tuple[Latent]:
    if not width and not height:
        return (samples,)
    h, w = _some(samples["samples"]).shape[-2:]
    # ComfyUI goes no smaller than 64 pixels here.
    height = max(64, height or round(h * max(64, width) / w))
    width = max(64, width or round(w * height / h))
    return (_scaled(context, samples, upscale_method, width // FACTOR, height // FACTOR, crop),)


@node(
    "LatentUpscaleBy",
    display_name="Upscale Latent By",
    category="latent",
    description="Scale latents by a factor.",
    inputs={
        "samples": LINK("LATENT"),
        "upscale_method": COMBO(LATENT_METHODS),
        "scale_by": FLOAT(1.5, min=0.01, max=8.0, step=0.01),
    },
    outputs=("LATENT",),
    search_aliases=("enlarge latent", "resize latent"),
)
def latent_upscale_by(context: Context, samples: Latent, upscale_method: str, scale_by: float) -> tuple[Latent]:
    height, width = (max(1, round(side * scale_by)) for side in _some(samples["samples"]).shape[-2:])
    return (_scaled(context, samples, upscale_method, width, height, "disabled"),)


def _scaled(context: Context, samples: Latent, method: str, width: int, height: int, crop: str) -> Latent:
    x = samples["samples"]
    check_drawn(context, width * FACTOR, height * FACTOR, len(x))
    return _with(samples, resize(x, width, height, method, crop=crop))


@node(
    "LatentCrop",
    display_name="Crop Latent",
    category="latent/transform",
    description="Cut a rectangle out of latents; what lies beyond their sides is left out.",
    inputs={"samples": LINK("LATENT")} | _sides(512, least=64) | {"x": PLACE, "y": PLACE},
    outputs=("LATENT",),
)
def latent_crop(context: Context, samples: Latent, width: int, height: int, x: int, y: int) -> tuple[Latent]:
    context.check()
    whole = _some(samples["samples"])
    # As in ComfyUI, at least 64 pixels are left where there are so many.
    left = min(x // FACTOR, max(whole.shape[3] - 8, 0))
    top = min(y // FACTOR, max(whole.shape[2] - 8, 0))
    return (_with(samples, whole[:, :, top : top + height // FACTOR, left : left + width // FACTOR].clone()),)


@node(
    "LatentFlip",
    display_name="Flip Latent",
    category="latent/transform",
    description="Mirror latents.",
    inputs={"samples": LINK("LATENT"), "flip_method": COMBO(("x-axis: vertically", "y-axis: horizontally"))},
    outputs=("LATENT",),
)
def latent_flip(context: Context, samples: Latent, flip_method: str) -> tuple[Latent]:
    context.check()
    return (_with(samples, samples["samples"].flip(2 if flip_method.startswith("x") else 3)),)


@node(
    "LatentRotate",
    display_name="Rotate Latent",
    category="latent/transform",
    description="Turn latents clockwise by quarters.",
    inputs={"samples": LINK("LATENT"), "rotation": COMBO(("none", "90 degrees", "180 degrees", "270 degrees"))},
    outputs=("LATENT",),
)
def latent_rotate(context: Context, samples: Latent, rotation: str) -> tuple[Latent]:
    context.check()
    quarters = {"none": 0, "90 degrees": 1, "180 degrees": 2, "270 degrees": 3}[rotation]
    return (_with(samples, samples["samples"].rot90(quarters, dims=(3, 2))),)


# Two into one


@node(
    "LatentComposite",
    display_name="Latent Composite",
    category="latent",
    description="Lay one latent over another; feather fades the sides that lie inside of it.",
    inputs={
        "samples_to": LINK("LATENT"),
        "samples_from": LINK("LATENT"),
        "x": PLACE,
        "y": PLACE,
        "feather": PLACE,
    },
    outputs=("LATENT",),
    search_aliases=("overlay latent", "paste latent"),
)
def latent_composite(
    context: Context, samples_to: Latent, samples_from: Latent, x: int, y: int, feather: int
) -> tuple[Latent]:
    context.check()
    under, over = samples_to["samples"], samples_from["samples"]
    over = _channels_of(over, under)
    left, top = x // FACTOR, y // FACTOR
    if top >= under.shape[2] or left >= under.shape[3]:
        raise RequestError(
            f"x={x}, y={y} lies outside of the latents, which are {under.shape[3] * FACTOR}x"
            f"{under.shape[2] * FACTOR} pixels: choose a place inside."
        )
    if len(over) not in (1, len(under)):
        raise RequestError(f"{len(over)} latents cannot be laid over {len(under)}: give one, or as many.")
    over = over[:, :, : under.shape[2] - top, : under.shape[3] - left]
    height, width = over.shape[-2:]
    # A side that lies on the side of the whole has nothing to fade into.
    rows = _ramp(height, feather // FACTOR, before=top > 0, after=top + height < under.shape[2])
    columns = _ramp(width, feather // FACTOR, before=left > 0, after=left + width < under.shape[3])
    weight = rows[:, None] * columns
    place = (..., slice(top, top + height), slice(left, left + width))
    out = under.clone()
    out[place] = over * weight + under[place] * (1 - weight)
    return (_with(samples_to, out),)


def _ramp(length: int, feather: int, *, before: bool, after: bool) -> Tensor:
    """Weights [length]: 1, but rising over the first `feather` or falling over the last ones where asked."""
    weights = torch.ones(length)
    rise = (torch.arange(1, feather + 1) / max(feather, 1))[:length]
    if before:
        weights[: len(rise)] *= rise
    if after:
        weights[length - len(rise) :] *= rise.flip(0)
    return weights


@node(
    "LatentBlend",
    display_name="Latent Blend",
    category="_for_testing",
    description="Mix two latents: blend_factor of the first, the rest of the second.",
    inputs={
        "samples1": LINK("LATENT"),
        "samples2": LINK("LATENT"),
        "blend_factor": FLOAT(0.5, min=0, max=1, step=0.01),
    },
    outputs=("LATENT",),
)
def latent_blend(context: Context, samples1: Latent, samples2: Latent, blend_factor: float) -> tuple[Latent]:
    context.check()
    first = _some(samples1["samples"])
    second = _channels_of(samples2["samples"], first)
    second = resize(second, first.shape[3], first.shape[2], "bicubic", crop="center")
    if len(first) != len(second) and 1 not in (len(first), len(second)):
        raise RequestError(f"{len(first)} latents cannot be mixed with {len(second)}: give as many of both, or one.")
    return (_with(samples1, first * blend_factor + second * (1 - blend_factor)),)


# Batches


@node(
    "LatentBatch",
    category="latent/batch",
    module="comfy_extras.nodes_latent",
    description="Both latents in one batch; the second is scaled to the size of the first.",
    inputs={"samples1": LINK("LATENT"), "samples2": LINK("LATENT")},
    outputs=("LATENT",),
    deprecated=True,
    search_aliases=("combine latents", "join latents"),
)
def latent_batch(context: Context, samples1: Latent, samples2: Latent) -> tuple[Latent]:
    first = _some(samples1["samples"])
    second = _channels_of(samples2["samples"], first)
    height, width = first.shape[-2:]
    check_drawn(context, width * FACTOR, height * FACTOR, len(first) + len(second))
    out = _with(samples1, torch.cat([first, resize(second, width, height, "bilinear", crop="center")]))
    out["batch_index"] = [*_places(samples1), *_places(samples2)]
    return (out,)


@node(
    "LatentFromBatch",
    display_name="Latent From Batch",
    category="latent/batch",
    description="Some of a batch of latents; they are drawn as they would be within it.",
    inputs={"samples": LINK("LATENT"), "batch_index": INT(0, min=0, max=63), "length": INT(1, min=1, max=64)},
    outputs=("LATENT",),
)
def latent_from_batch(context: Context, samples: Latent, batch_index: int, length: int) -> tuple[Latent]:
    context.check()
    x = _some(samples["samples"])
    first = min(batch_index, len(x) - 1)
    chosen = slice(first, min(first + length, len(x)))
    out = _with(samples, x[chosen].clone())
    if "noise_mask" in samples and len(samples["noise_mask"]) > 1:
        out["noise_mask"] = _as_many(samples["noise_mask"], len(x))[chosen].clone()
    out["batch_index"] = list(_places(samples))[chosen]
    return (out,)


@node(
    "RepeatLatentBatch",
    display_name="Repeat Latent Batch",
    category="latent/batch",
    description="The same latents several times over; each is drawn from other noise.",
    inputs={"samples": LINK("LATENT"), "amount": INT(1, min=1, max=64)},
    outputs=("LATENT",),
)
def repeat_latent_batch(context: Context, samples: Latent, amount: int) -> tuple[Latent]:
    x = samples["samples"]
    check_drawn(context, x.shape[-1] * FACTOR, x.shape[-2] * FACTOR, len(x) * amount)
    out = _with(samples, x.repeat(amount, 1, 1, 1))
    if "noise_mask" in samples and len(samples["noise_mask"]) > 1:
        out["noise_mask"] = _as_many(samples["noise_mask"], len(x)).repeat(amount, 1, 1, 1)
    if "batch_index" in samples:
        places = samples["batch_index"]
        stride = max(places) - min(places) + 1
        out["batch_index"] = [place + turn * stride for turn in range(amount) for place in places]
    return (out,)


# Shared


def _with(samples: Latent, x: Tensor) -> Latent:
    """The same latents with other numbers."""
    return cast(Latent, {**samples, "samples": x})


def _some(x: Tensor) -> Tensor:
    """`x`, which must hold at least one number."""
    if x.ndim != 4 or not x.numel():
        raise RequestError(f"Latents [batch, channels, height, width] are needed, and these are {list(x.shape)}.")
    return x


def _channels_of(x: Tensor, like: Tensor) -> Tensor:
    """`x` with as many channels as `like`; zeros, as EmptyLatentImage makes them, may have any number."""
    if _some(x).shape[1] == _some(like).shape[1]:
        return x
    if x.any():
        raise RequestError(
            f"Latents of {x.shape[1]} and {like.shape[1]} channels do not go together: make both for the same model, "
            f"with EmptySD3LatentImage or VAEEncode."
        )
    return x.new_zeros(len(x), like.shape[1], *x.shape[2:])


def _places(samples: Latent) -> Sequence[int]:
    """Which picture of its seed each row is."""
    return samples.get("batch_index", range(len(samples["samples"])))


def _as_many(mask: Tensor, count: int) -> Tensor:
    """The first `count` rows of a mask whose rows are repeated as often as needed."""
    return mask.repeat(-(-count // len(mask)), 1, 1, 1)[:count]


NODES: tuple[NodeSpec, ...] = (
    empty_latent_image,
    empty_sd3_latent_image,
    latent_upscale,
    latent_upscale_by,
    latent_crop,
    latent_flip,
    latent_rotate,
    latent_composite,
    latent_blend,
    latent_batch,
    latent_from_batch,
    repeat_latent_batch,
)
