"""ControlNets against diffusers' recorded outputs, read from files in both layouts."""

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from octavo.checkpoint.load import load_controlnet
from octavo.errors import CorruptFileError
from octavo.fp8 import Fp8Linear, LinearSpec
from octavo.models import ControlNet, ControlNetConfig
from octavo.models.controlnet import spread
from octavo.quantize import convert
from tests.goldens import golden
from tests.models.test_mmdit import diffusers_model

FILES = {"8b": "controlnet_8b_tiny_original", "joint": "controlnet_joint_tiny_diffusers"}
STEERED = {"8b": "large", "joint": "medium"}
SCALE = 0.7  # at which the outputs were recorded


def inputs() -> dict[str, Tensor]:
    return load_file(golden("diffusers/transformer_large_tiny_io.safetensors"))


def residuals(net: ControlNet, control: Tensor) -> tuple[Tensor, ...]:
    io = inputs()
    modulation = net.modulation(io["in.timestep"], io["in.pooled_projections"])
    embed = diffusers_model("large").embed_image
    return net(io["in.hidden_states"], control, io["in.encoder_hidden_states"], modulation, embed=embed)


@pytest.mark.parametrize("kind", FILES)
def test_residuals_and_the_picture_are_those_of_diffusers(kind: str) -> None:
    net = load_controlnet(golden(f"diffusers/{FILES[kind]}.safetensors"))
    recorded, io, model = (
        load_file(golden(f"diffusers/controlnet_{kind}_tiny_io.safetensors")),
        inputs(),
        diffusers_model(STEERED[kind]),
    )
    found = [SCALE * each for each in residuals(net, recorded["in.controlnet_cond"])]
    assert len(found) == net.config.depth
    for i, residual in enumerate(found):
        assert (residual - recorded[f"out.residual_{i}"]).abs().max() < 2e-5
    sample = model(
        io["in.hidden_states"],
        io["in.encoder_hidden_states"],
        model.modulation(io["in.timestep"], io["in.pooled_projections"]),
        control=spread(found, model.config.depth, last=False),
    )
    assert (sample - recorded["out.sample_with_controlnet"]).abs().max() < 2e-5


def test_files_say_what_kind_they_are() -> None:
    released = load_controlnet(golden("diffusers/controlnet_8b_tiny_original.safetensors")).config
    assert (released.joint, released.last, released.pos_embed_size) == (False, True, 0)
    assert (
        released.control_type
        == ("blur", "canny", "depth")[
            int(load_file(golden("diffusers/controlnet_8b_tiny_original.safetensors"))["control_type"])
        ]
    )
    other = load_controlnet(golden("diffusers/controlnet_joint_tiny_diffusers.safetensors")).config
    assert (other.joint, other.last, other.pos_embed_size, other.dual_attention) == (True, False, 24, (0,))
    assert other.zero_pooled
    assert other.control_type is None


def test_in_fp8_it_stays_near() -> None:
    """Weights rounded by row to 3 bits of mantissa err by at most a 16th each, at random: far less together."""
    net = load_controlnet(golden("diffusers/controlnet_8b_tiny_original.safetensors"))
    control = load_file(golden("diffusers/controlnet_8b_tiny_io.safetensors"))["in.controlnet_cond"]
    exact = residuals(net, control)
    names = [name for name, module in net.named_modules() if isinstance(module, torch.nn.Linear)]
    convert(net, dict.fromkeys(names, LinearSpec(granularity="row")))
    assert isinstance(net.outputs[0], Fp8Linear)
    for plain, rounded in zip(exact, residuals(net, control), strict=True):
        assert 0 < (plain - rounded).norm() / plain.norm() < 1 / 16


@pytest.mark.parametrize(
    ("depth", "count", "expected"),
    [(38, 19, [i // 2 for i in range(38)]), (3, 1, [0, 0, 0]), (24, 12, [i // 2 for i in range(24)])],
)
def test_residuals_are_spread_evenly_over_the_blocks(depth: int, count: int, expected: list[int]) -> None:
    each = [torch.tensor(float(i)) for i in range(count)]
    assert [int(r) for r in spread(each, depth, last=True) if r is not None] == expected
    without = spread(each, depth, last=False)
    assert without[-1] is None
    assert len(without) == depth


def test_odd_sides_are_padded_as_the_models_are() -> None:
    net = ControlNet(
        ControlNetConfig(depth=1, width=64, heads=1, context_width=8, pooled_width=8, pos_embed_size=8, joint=True)
    )
    modulation = net.modulation(torch.tensor([500.0]), torch.zeros(1, 8))
    latents = torch.randn(1, 16, 5, 7)
    (residual,) = net(latents, latents, torch.zeros(1, 3, 8), modulation, embed=lambda _: pytest.fail("has its own"))
    assert residual.shape == (1, 3 * 4, 64)


def test_an_unknown_control_type_is_refused(tmp_path_factory: pytest.TempPathFactory) -> None:
    from octavo.checkpoint.save import save_safetensors

    tensors = load_file(golden("diffusers/controlnet_8b_tiny_original.safetensors"))
    path = tmp_path_factory.mktemp("files") / "net.safetensors"
    save_safetensors(path, tensors | {"control_type": torch.tensor([7])})
    with pytest.raises(CorruptFileError, match="control_type 7; known are blur, canny, depth"):
        load_controlnet(path)
