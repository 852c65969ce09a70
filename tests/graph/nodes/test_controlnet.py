"""Nodes that let prompts follow pictures: as ComfyUI declares them, and what they hand on."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from octavo.errors import RequestError
from octavo.graph.context import Context
from octavo.graph.nodes import controlnet
from octavo.graph.nodes.types import Conditions
from octavo.models import ControlNetConfig
from octavo.pipeline.conditions import Condition
from octavo.pipeline.encode import Conditioning
from tests.goldens import golden
from tests.graph.compare import differences
from tests.graph.nodes.runs import context_with

FILE = "depth.safetensors"


@pytest.fixture(name="context")
def a_context(tmp_path: Path) -> Context:
    (tmp_path / "controlnet").mkdir()
    tensors = load_file(golden("diffusers/controlnet_8b_tiny_original.safetensors"))
    save_file(tensors | {"control_type": torch.tensor([2])}, tmp_path / "controlnet" / FILE)
    return context_with(tmp_path)


def text(count: int = 1) -> Conditions:
    return tuple(Condition(conditioning=Conditioning(torch.zeros(1, 3, 96), torch.zeros(1, 48))) for _ in range(count))


def test_the_nodes_are_declared_as_comfyui_declares_them() -> None:
    for spec in controlnet.NODES:
        assert differences(spec) == []


def test_both_sides_follow_and_controls_add_up_in_order(context: Context) -> None:
    (net,) = controlnet.controlnet_loader.run(context, control_net_name=FILE)
    assert controlnet.controlnet_loader.run(context, control_net_name=FILE) == (net,), "one file is one net"
    vae = context.shelf.checkpoint("octavo-demo.safetensors")[2]
    image, told = torch.rand(1, 40, 64, 3), {"control_net": net, "vae": vae}
    numbers = {"strength": 0.7, "start_percent": 0.1, "end_percent": 0.6}
    first = controlnet.controlnet_apply_advanced.run(
        context, positive=text(2), negative=text(), image=image, **told, **numbers
    )
    second = controlnet.controlnet_apply_sd3.run(
        context, positive=first[0], negative=first[1], image=1 - image, **told, **numbers | {"strength": 2.0}
    )
    for side, count in zip(second, (2, 1), strict=True):
        assert len(side) == count
        for condition in side:
            found = [(each.strength, each.start, each.end, each.net) for each in condition.control]
            assert found == [(0.7, 0.1, 0.6, net), (2.0, 0.1, 0.6, net)]
    depth, other = (each.hint((5, 8)) for each in second[0][0].control)
    assert depth.shape == (1, 16, 5, 8)
    # As ComfyUI has it, depth is turned around: the hint of 1 - x is the plain latent of x.
    plain = type(second[0][0].control[0].hint)(
        image.movedim(-1, 1), ControlNetConfig(depth=1, width=64, heads=1), vae.part
    )
    assert torch.allclose(other, plain((5, 8)), atol=1e-5)
    assert not torch.allclose(depth, plain((5, 8)), atol=1e-2)


def test_without_strength_there_is_no_control_and_without_vae_a_reason(context: Context) -> None:
    (net,) = controlnet.controlnet_loader.run(context, control_net_name=FILE)
    sides, image = {"positive": text(), "negative": text()}, torch.zeros(1, 8, 8, 3)
    told = {"control_net": net, "image": image, "start_percent": 0.0, "end_percent": 1.0}
    untouched = controlnet.controlnet_apply_advanced.run(context, **sides, **told, strength=0)
    assert untouched == (sides["positive"], sides["negative"])
    with pytest.raises(RequestError, match="needs a VAE: connect the model's"):
        controlnet.controlnet_apply_advanced.run(context, **sides, **told, strength=1.0)
