"""Nodes that load models: whole checkpoints, diffusion models, text encoders and VAEs, by the names of their files.

A file that is replaced under its name is another file, so that its loader runs again.
"""

from collections.abc import Callable

from octavo.errors import RequestError
from octavo.graph.context import Context
from octavo.graph.nodes.types import ModelLink
from octavo.graph.spec import COMBO, NodeSpec, files, node
from octavo.pipeline.shelf import WEIGHT_DTYPES, Clip, Vae

# The kinds of model that ComfyUI's loaders name. Octavo runs "sd3"; the others are listed to be told so.
_SINGLE_TYPES = (
    "stable_diffusion", "stable_cascade", "sd3", "stable_audio", "mochi", "ltxv", "pixart", "cosmos", "lumina2", "wan",
    "hidream", "chroma", "ace", "omnigen2", "qwen_image", "hunyuan_image", "flux2", "ovis",
)  # fmt: skip
_DUAL_TYPES = (
    "sdxl", "sd3", "flux", "hunyuan_video", "hidream", "hunyuan_image", "hunyuan_video_15", "kandinsky5",
    "kandinsky5_image", "ltxv", "newbie", "ace",
)  # fmt: skip
_DEVICE = COMBO(("default", "cpu"), advanced=True).optional


def stamps_of(*categories: str) -> Callable[..., object]:
    """For `is_changed`: when the named files of these categories were written, and how large they are."""

    def stamps(context: Context, **inputs: str | None) -> object:
        names = [name for key, name in inputs.items() if key.rstrip("123").endswith("_name")]
        found = [context.shelf.folders.find(name, *categories).stat() for name in names if name is not None]
        return [(stat.st_mtime_ns, stat.st_size) for stat in found]

    return stamps


@node(
    "CheckpointLoaderSimple",
    display_name="Load Checkpoint",
    category="loaders",
    description="Loads a model file. Text encoders and VAE that it does not hold are taken from the models folder.",
    inputs={"ckpt_name": COMBO(files("checkpoints"), tooltip="File in the checkpoints folder.")},
    outputs=("MODEL", "CLIP", "VAE"),
    output_tooltips=("Draws latents.", "Encodes texts.", "Turns latents into pictures and back."),
    search_aliases=("load model", "checkpoint", "model loader", "ckpt"),
    is_changed=stamps_of("checkpoints"),
)
def checkpoint_loader_simple(context: Context, ckpt_name: str) -> tuple[ModelLink, Clip | None, Vae | None]:
    """Model, text encoders and VAE of a checkpoint."""
    model, clip, vae = context.shelf.checkpoint(ckpt_name)
    return ModelLink.of(model), clip, vae


@node(
    "UNETLoader",
    display_name="Load Diffusion Model",
    category="advanced/loaders",
    description="Loads a diffusion model without text encoders and VAE. A weight_dtype of fp8 quantizes what the file "
    "keeps in more bits; fp8_e4m3fn_fast also lets inputs be rounded.",
    inputs={"unet_name": COMBO(files("diffusion_models")), "weight_dtype": COMBO(tuple(WEIGHT_DTYPES))},
    outputs=("MODEL",),
    search_aliases=("load diffusion model", "unet", "transformer"),
    is_changed=stamps_of("diffusion_models"),
)
def unet_loader(context: Context, unet_name: str, weight_dtype: str) -> tuple[ModelLink]:
    """A diffusion model alone."""
    return (ModelLink.of(context.shelf.diffusion_model(unet_name, weight_dtype)),)


@node(
    "CLIPLoader",
    display_name="Load CLIP",
    category="advanced/loaders",
    description="Loads one text encoder: CLIP-L, CLIP-G or T5-XXL. The type must be sd3.",
    inputs={"clip_name": COMBO(files("text_encoders")), "type": COMBO(_SINGLE_TYPES), "device": _DEVICE},
    outputs=("CLIP",),
    is_changed=stamps_of("text_encoders"),
)
def clip_loader(context: Context, clip_name: str, type: str, device: str = "default") -> tuple[Clip]:
    """One text encoder; the model is told nothing by the others."""
    return _text_encoders(context, [clip_name], type, device)


@node(
    "DualCLIPLoader",
    category="advanced/loaders",
    description="Loads two of CLIP-L, CLIP-G and T5-XXL. The type must be sd3.",
    inputs={
        "clip_name1": COMBO(files("text_encoders")),
        "clip_name2": COMBO(files("text_encoders")),
        "type": COMBO(_DUAL_TYPES),
        "device": _DEVICE,
    },
    outputs=("CLIP",),
    is_changed=stamps_of("text_encoders"),
)
def dual_clip_loader(
    context: Context, clip_name1: str, clip_name2: str, type: str, device: str = "default"
) -> tuple[Clip]:
    """Two text encoders, in any order."""
    return _text_encoders(context, [clip_name1, clip_name2], type, device)


@node(
    "TripleCLIPLoader",
    module="comfy_extras.nodes_sd3",
    category="advanced/loaders",
    description="Loads CLIP-L, CLIP-G and T5-XXL, in any order.",
    inputs={
        "clip_name1": COMBO(files("text_encoders")),
        "clip_name2": COMBO(files("text_encoders")),
        "clip_name3": COMBO(files("text_encoders")),
    },
    outputs=("CLIP",),
    is_changed=stamps_of("text_encoders"),
)
def triple_clip_loader(context: Context, clip_name1: str, clip_name2: str, clip_name3: str) -> tuple[Clip]:
    """All three text encoders."""
    return _text_encoders(context, [clip_name1, clip_name2, clip_name3], "sd3", "default")


@node(
    "VAELoader",
    display_name="Load VAE",
    category="loaders",
    description="Loads a VAE.",
    inputs={"vae_name": COMBO(files("vae"))},
    outputs=("VAE",),
    is_changed=stamps_of("vae"),
)
def vae_loader(context: Context, vae_name: str) -> tuple[Vae]:
    """A VAE alone."""
    return (context.shelf.vae(vae_name),)


def _text_encoders(context: Context, names: list[str], kind: str, device: str) -> tuple[Clip]:
    """The encoders in these files.

    Raises:
        RequestError: of another kind than sd3, or on another device than all the rest.
    """
    if device != "default" and context.shelf.device.type != device:
        raise RequestError(
            f"device '{device}': Octavo keeps text encoders on {context.shelf.device}, with the model, and makes them "
            "leave when memory is short. Choose default, or start Octavo with --device cpu."
        )
    return (context.shelf.clip(names, kind),)


NODES: tuple[NodeSpec, ...] = (
    checkpoint_loader_simple,
    unet_loader,
    clip_loader,
    dual_clip_loader,
    triple_clip_loader,
    vae_loader,
)
