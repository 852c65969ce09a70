"""The embedded model behind the doors: the pictures are those that `octavo.generate` draws."""

import base64
import io
from pathlib import Path
from typing import Any

import openai
import pytest
import webuiapi
from PIL import Image, ImageChops, ImageDraw

from octavo import GenerateRequest, generate, load
from tests.server.conftest import Live, listening, settings_in, until

WISH: dict[str, Any] = {"prompt": "a large red star on a blue background", "seed": 3, "steps": 3}
SIZE = {"width": 128, "height": 96}


@pytest.fixture(scope="module")
def drawn() -> Image.Image:
    """What the library draws."""
    request = GenerateRequest(**WISH, **SIZE, guidance_scale=2.5, sampler="euler", schedule="simple")
    (picture,) = generate(load(device="cpu"), request)
    return picture.image


def test_a1111_gives_the_librarys_picture(live_model: Live, drawn: Image.Image) -> None:
    client = webuiapi.WebUIApi(port=live_model.port)
    result = client.txt2img(**WISH, **SIZE, cfg_scale=2.5, sampler_name="Euler", scheduler="Simple", batch_size=2)
    assert result.images[0].tobytes() == drawn.tobytes()
    assert result.images[1].tobytes() != drawn.tobytes()
    assert result.info["all_seeds"] == [3, 4]


def test_openai_gives_the_librarys_picture(live_model: Live, drawn: Image.Image) -> None:
    own = {"seed": 3, "steps": 3, "guidance_scale": 2.5, "sampler": "euler", "schedule": "simple"}
    with openai.OpenAI(base_url=f"{live_model.url}/v1", api_key="none", max_retries=0) as client:
        answer = client.images.generate(prompt=WISH["prompt"], size="128x96", extra_body=own)  # type: ignore[call-overload]
    image = Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json)))
    assert image.tobytes() == drawn.tobytes()


def test_only_what_is_masked_is_drawn_anew_and_no_path_is_told(live_model: Live, drawn: Image.Image) -> None:
    mask = Image.new("L", drawn.size, 0)
    ImageDraw.Draw(mask).rectangle((32, 32, 79, 79), fill=255)
    client = webuiapi.WebUIApi(port=live_model.port)
    for only_masked in (False, True):
        result = client.img2img(
            images=[drawn], mask_image=mask, mask_blur=0, inpaint_full_res=only_masked, inpainting_fill=1,
            prompt="a green circle", seed=1, steps=3, denoising_strength=1.0, sampler_name="Euler", **SIZE,
        )  # fmt: skip
        box = ImageChops.difference(result.image.convert("RGB"), drawn).getbbox()
        assert box is not None
        assert (box[0] >= 32, box[1] >= 32, box[2] <= 80, box[3] <= 80) == (True,) * 4
        told = str(result.image.info) + str(result.info)
        assert str(live_model.settings.data_dir) not in told
        assert "green circle" in told


def test_the_server_tells_how_its_layers_multiply(live_model: Live) -> None:
    import httpx

    text = httpx.get(f"{live_model.url}/metrics").text
    for name in ("octavo_stage_seconds", "octavo_batch_size", "octavo_steps_total", "octavo_device_bytes"):
        assert name in text


def test_a_lora_that_is_not_there_is_said_so(live_model: Live) -> None:
    import httpx

    body = {"prompt": "a star <lora:no such one:0.5>", "steps": 1, "width": 64, "height": 64}
    answer = httpx.post(f"{live_model.url}/sdapi/v1/txt2img", json=body)
    assert 400 <= answer.status_code < 500
    assert "no such one" in answer.json()["detail"]


def test_fp8_layers_are_counted_by_how_they_multiply(tmp_path: Path) -> None:
    import re

    import httpx

    with listening(settings_in(tmp_path, model="octavo-demo-fp8", loading={"device": "cpu"}), load=None) as live:
        until(lambda: live.state.is_ready, "the model is loaded")
        text = httpx.get(f"{live.url}/metrics").text
        counts = [float(count) for count in re.findall(r'^octavo_fp8_layers\{path="[^"]+"\} (\S+)', text, re.M)]
        assert sum(counts) == live.state.shelf.components("octavo-demo-fp8").mmdit.fp8_linears > 0
        assert httpx.get(f"{live.url}/v1/models").json()["data"][0]["id"] == "octavo-demo-fp8"
