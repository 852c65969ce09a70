"""Nodes that make a prompt's prediction follow a picture, by ControlNets.

Those for SD3 and SD3.5 see pictures as latents, so that they need a VAE; the picture is scaled to the latents that are
drawn when the sampler starts. Values are ComfyUI's: it turns depth pictures around, see `pipeline.hints`.
"""

from dataclasses import replace

from torch import Tensor

from octavo.errors import RequestError
from octavo.graph.context import Context
from octavo.graph.nodes.loaders import stamps_of
from octavo.graph.nodes.types import Conditions
from octavo.graph.spec import COMBO, FLOAT, LINK, NodeSpec, files, node
from octavo.models import ControlNet
from octavo.pipeline.components import Part
from octavo.pipeline.control import Control
from octavo.pipeline.controlnets import config_of
from octavo.pipeline.hints import ControlPicture
from octavo.pipeline.shelf import Vae

_CATEGORY = "conditioning/controlnet"
_STRENGTH = FLOAT(1.0, min=0.0, max=10.0, step=0.01)
_START = FLOAT(0.0, min=0.0, max=1.0, step=0.001)
_END = FLOAT(1.0, min=0.0, max=1.0, step=0.001)
_SIDES = {"positive": LINK("CONDITIONING"), "negative": LINK("CONDITIONING"), "control_net": LINK("CONTROL_NET")}
_HOW = {"image": LINK("IMAGE"), "strength": _STRENGTH, "start_percent": _START, "end_percent": _END}
_BOTH = (("CONDITIONING", "positive"), ("CONDITIONING", "negative"))


@node(
    "ControlNetLoader",
    display_name="Load ControlNet Model",
    category="loaders",
    description="Loads a ControlNet: one of those released for SD3.5 Large, or one in diffusers' layout.",
    inputs={"control_net_name": COMBO(files("controlnet"))},
    outputs=("CONTROL_NET",),
    search_aliases=("controlnet", "control net", "load controlnet", "controlnet loader"),
    is_changed=stamps_of("controlnet"),
)
def controlnet_loader(context: Context, control_net_name: str) -> tuple[Part[ControlNet]]:
    """A ControlNet alone."""
    return (context.shelf.controlnets.part(control_net_name),)


@node(
    "ControlNetApplyAdvanced",
    display_name="Apply ControlNet",
    category=_CATEGORY,
    description="Both prompts follow the picture, from start to end of the noise schedule. Connect the model's VAE. "
    "Several in a row add up.",
    inputs={**_SIDES, **_HOW, "vae": LINK("VAE").optional},
    outputs=_BOTH,
    search_aliases=("controlnet", "apply controlnet", "use controlnet", "control net"),
)
def controlnet_apply_advanced(
    context: Context,
    positive: Conditions,
    negative: Conditions,
    control_net: Part[ControlNet],
    image: Tensor,
    strength: float,
    start_percent: float,
    end_percent: float,
    vae: Vae | None = None,
) -> tuple[Conditions, Conditions]:
    """One more control on each condition of both sides."""
    context.check()
    return _applied((positive, negative), control_net, vae, image, strength, (start_percent, end_percent))


@node(
    "ControlNetApplySD3",
    module="comfy_extras.nodes_sd3",
    display_name="Apply Controlnet with VAE",
    category=_CATEGORY,
    description="The same as Apply ControlNet, by its name of before.",
    inputs={**_SIDES, "vae": LINK("VAE"), **_HOW},
    outputs=_BOTH,
    deprecated=True,
)
def controlnet_apply_sd3(
    context: Context,
    positive: Conditions,
    negative: Conditions,
    control_net: Part[ControlNet],
    vae: Vae,
    image: Tensor,
    strength: float,
    start_percent: float,
    end_percent: float,
) -> tuple[Conditions, Conditions]:
    """One more control on each condition of both sides."""
    context.check()
    return _applied((positive, negative), control_net, vae, image, strength, (start_percent, end_percent))


def _applied(
    sides: tuple[Conditions, Conditions],
    net: Part[ControlNet],
    vae: Vae | None,
    image: Tensor,
    strength: float,
    between: tuple[float, float],
) -> tuple[Conditions, Conditions]:
    if strength == 0:
        return sides
    if vae is None:
        raise RequestError(
            f"'{net.path.name}' sees pictures as latents and so needs a VAE: connect the model's to the vae input of "
            "Apply ControlNet."
        )
    config = config_of(net)
    control = Control(
        net=net,
        config=config,
        name=net.path.name,
        hint=ControlPicture(image[..., :3].movedim(-1, 1), config, vae.part, comfyui=True),
        strength=strength,
        start=between[0],
        end=between[1],
    )
    return _following(sides[0], control), _following(sides[1], control)


def _following(conditions: Conditions, control: Control) -> Conditions:
    return tuple(replace(condition, control=(*condition.control, control)) for condition in conditions)


NODES: tuple[NodeSpec, ...] = (controlnet_loader, controlnet_apply_advanced, controlnet_apply_sd3)
