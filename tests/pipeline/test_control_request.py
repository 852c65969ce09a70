"""What is asked of ControlNets, from the command's words to the nets and pictures that it comes to."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file

import octavo
from octavo.errors import ModelNotFoundError, RequestError, WrongModelError
from octavo.fp8 import Fp8Linear
from octavo.models import ControlNetConfig
from octavo.models.vae import SCALE, SHIFT
from octavo.pipeline.control_request import ControlImage, control_called
from octavo.pipeline.controlnets import control_pixels
from octavo.pipeline.edges import canny
from octavo.pipeline.hints import ControlPicture, encode_hint, scaled
from octavo.pipeline.request import GenerateRequest
from octavo.pipeline.shelf import LoadSettings, Shelf
from tests.goldens import golden


@pytest.fixture(name="photo")
def a_photo(tmp_path: Path) -> Path:
    image = Image.new("RGB", (160, 160), "white")
    ImageDraw.Draw(image).ellipse((40, 40, 120, 120), fill="black")
    image.save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_the_short_form_finds_edges_and_the_long_one_says_everything() -> None:
    assert control_called("canny:a/b.png", strength=0.5) == ControlImage(
        image="a/b.png", type="canny", preprocess="canny", strength=0.5
    )
    assert control_called("depth:d.png", end=0.6) == ControlImage(image="d.png", type="depth", end=0.6)
    assert control_called("model=net, image=x.png, strength=2, start=0.1, invert=yes", strength=0.5) == ControlImage(
        image="x.png", model="net", strength=2, start=0.1, invert=True
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("photo.png", "cannot be understood"),
        ("cany:photo.png", "Did you mean 'canny'"),
        ("canny:", "no picture"),
        ("image=x.png", "neither type nor model"),
        ("model=net,image=x.png,power=2", "'power' is no setting of a control"),
        ("model=net,image=x.png,strength=high", "strength=high: write a number"),
        ("model=net,image=x.png,strength=nan", "strength of the ControlNet 'net' is nan"),
        ("model=net,image=x.png,strength=11", "from 0 to 10"),
        ("type=canny,image=x.png,start=0.5,end=0.2", "need 0 <= start < end <= 1"),
        ("type=canny,image=x.png,low=0.9,high=0.1", "0 < low <= high"),
        ("type=pose,image=x.png", "no control of type 'pose'"),
        ("type=canny,image=x.png,invert=maybe", "write yes or no"),
        ("type=depth,image=x.png,preprocess=depth", "only canny"),
    ],
)
def test_what_cannot_be_meant_is_refused(text: str, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        control_called(text)


def test_controls_travel_with_the_settings() -> None:
    asked = GenerateRequest(prompt="x", controls=(control_called("canny:a.png"), control_called("model=m,image=b.png")))
    plain = asked.settings
    assert plain["controls"] == [
        {"image": "a.png", "type": "canny", "preprocess": "canny"},
        {"image": "b.png", "model": "m"},
    ]
    assert GenerateRequest.from_settings(plain) == asked
    with pytest.raises(RequestError):
        GenerateRequest.from_settings({"prompt": "x", "controls": [{"image": 3}]})


def test_edges_are_those_of_the_canny_node(photo: Path) -> None:
    found = control_pixels(control_called(f"canny:{photo}"), (160, 160))
    image = Image.open(photo)
    pixels = torch.tensor(list(image.tobytes())).view(1, 160, 160, 3).movedim(-1, 1) / 255
    assert torch.equal(found, canny(pixels, 0.4, 0.8).expand(-1, 3, -1, -1))
    assert 200 < found[0, 0].sum() < 300  # about as many pixels as the circle is round: 80 pi


def test_a_picture_of_another_shape_is_cut_with_a_warning(photo: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert control_pixels(control_called(f"canny:{photo}"), (128, 128)).shape == (1, 3, 128, 128)
    assert not caplog.records
    assert control_pixels(control_called(f"canny:{photo}"), (160, 96)).shape == (1, 3, 96, 160)
    assert "photo.png is 160x160, the picture drawn 160x96: what does not fit is cut" in caplog.text


def test_pictures_that_cannot_be_followed_are_refused_by_name(photo: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(photo.read_bytes()[:60])
    Image.new("RGB", (64, 64), "grey").save(tmp_path / "flat.png")
    for name, said in [("none.png", "no file"), ("broken.png", "broken.png cannot be read"), ("flat.png", "no edges")]:
        with pytest.raises(RequestError, match=said):
            control_pixels(control_called(f"canny:{tmp_path / name}"), (64, 64))


def test_values_become_what_each_net_was_trained_with() -> None:
    """Stability AI's numbers, and ComfyUI's: its VAE takes 2x - 1 of what its ControlNet prepared."""
    pixels, base = torch.tensor([0.0, 0.25, 1.0]), ControlNetConfig(depth=1, width=64, heads=1)
    told = {
        kind: ControlNetConfig(depth=1, width=64, heads=1, control_type=kind) for kind in ("blur", "canny", "depth")
    }
    assert scaled(pixels, told["canny"]).tolist() == [0.5, 0.25 * 127.5 + 0.5, 128.0]
    assert scaled(pixels, told["canny"], comfyui=True).tolist() == [2 * (x * 127.5 + 0.5) - 1 for x in (0, 0.25, 1)]
    assert scaled(pixels, told["depth"], comfyui=True).tolist() == [2 * (1 - x) - 1 for x in (0, 0.25, 1)]
    for config in (base, told["blur"], told["depth"]):
        assert scaled(pixels, config).tolist() == [-1, -0.5, 1]
    assert torch.equal(scaled(pixels, told["blur"], comfyui=True), scaled(pixels, base))


def test_nets_without_pooled_text_get_latents_that_are_not_shifted() -> None:
    vae = octavo.load(device="cpu", dtype="float32").vae()
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        shifted, scaled_only = (
            encode_hint(vae, pixels, ControlNetConfig(depth=1, width=64, heads=1, zero_pooled=zero))
            for zero in (False, True)
        )
    assert torch.allclose(scaled_only - shifted, torch.tensor(SHIFT * SCALE), atol=1e-5)


def test_a_hint_is_encoded_once_for_each_size_and_keeps_thin_lines() -> None:
    vae, asked = octavo.load(device="cpu", dtype="float32").vae(), []

    def give() -> torch.nn.Module:
        asked.append(1)
        return vae

    picture = ControlPicture(torch.zeros(1, 3, 64, 96), ControlNetConfig(depth=1, width=64, heads=1), give)  # type: ignore[arg-type]
    assert picture((4, 6)).shape == (1, 16, 4, 6)
    assert picture((4, 6)) is picture((4, 6))
    assert picture((8, 8)).shape == (1, 16, 8, 8)
    assert len(asked) == 2


def tree(root: Path, kind: int = 2) -> Path:
    """A models tree with a ControlNet for another model."""
    (root / "controlnet").mkdir(parents=True)
    tensors = load_file(golden("diffusers/controlnet_8b_tiny_original.safetensors"))
    save_file(tensors | {"control_type": torch.tensor([kind])}, root / "controlnet" / "tiny-depth.safetensors")
    return root


def test_a_net_that_is_not_there_or_is_for_another_model_says_what_to_do(tmp_path: Path, photo: Path) -> None:
    components = octavo.load(models_dir=tree(tmp_path / "models"), device="cpu")
    with pytest.raises(ModelNotFoundError, match=r"for depth pictures in .*models/controlnet.*tiny-depth"):
        components.controls((control_called(f"depth:{photo}"),), 128, 128)
    with pytest.raises(WrongModelError, match="steers models of width 128"):
        components.controls((control_called(f"model=tiny-depth,image={photo}"),), 128, 128)
    with pytest.raises(RequestError, match="follows depth pictures, not canny"):
        components.controls((control_called(f"model=tiny-depth,type=canny,image={photo}"),), 128, 128)
    with pytest.raises(ModelNotFoundError, match="ControlNets that are there: tiny-depth"):
        components.controls((control_called(f"model=other,image={photo}"),), 128, 128)


def test_force_fp8_quantizes_controlnets_too(tmp_path: Path) -> None:
    """By row, 3 bits of mantissa: each weight errs by at most a 16th, at random, the outputs by far less together."""
    settings = LoadSettings(models_dir=tree(tmp_path / "models"), device="cpu", dtype="float32")
    plain = Shelf(settings).controlnets.part("tiny-depth.safetensors")
    forced = Shelf(replace(settings, force_fp8=True)).controlnets.part("tiny-depth.safetensors")
    assert plain.fp8_linears == 0
    assert forced.forced_linears == forced.fp8_linears == forced.linears > 10
    assert isinstance(forced().outputs[0], Fp8Linear)
    assert forced.nbytes < 0.4 * plain.nbytes
    with pytest.raises(ModelNotFoundError):  # over a network a name is one of the tree's, never a path
        Shelf(settings).controlnets.part(str(plain.path))
