"""AUTOMATIC1111's hires fix, asked by the `webuiapi` client, and field by field."""

import base64
import io
import json
from typing import Any

import pytest
import torch
import webuiapi
from PIL import Image
from starlette.testclient import TestClient

from octavo import GenerateRequest, generate, load
from octavo.pipeline.hires import Hires
from octavo.pipeline.resize import resize
from tests.server.conftest import Live, MakeServer

FIRST = {
    "prompt": "a red star on a blue background", "seed": 5, "steps": 3, "width": 64, "height": 48, "cfg_scale": 3.0,
    "sampler_name": "Euler", "scheduler": "Simple",
}  # fmt: skip


def asked(server: TestClient, **more: Any) -> dict[str, Any]:
    """The second pass as the job has it; empty without one."""
    answer = server.post("/sdapi/v1/txt2img", json={**FIRST, **more})
    assert answer.status_code == 200, answer.text
    state = server.app.state.octavo  # type: ignore[attr-defined]
    hires: dict[str, Any] = state.queue.history("generate")[0].payload["request"].get("hires", {})
    return hires


def test_webuiapi_draws_the_picture_that_generate_draws(live_model: Live) -> None:
    client = webuiapi.WebUIApi(port=live_model.port)
    result = client.txt2img(
        **FIRST, enable_hr=True, hr_scale=2, hr_upscaler=webuiapi.HiResUpscaler.Lanczos, hr_second_pass_steps=4,
        denoising_strength=0.6, hr_prompt="a blue star", hr_negative_prompt="red", hr_sampler_name="Heun",
    )  # fmt: skip
    hires = Hires(
        scale=2, method="lanczos", steps=4, denoise=0.6, prompt="a blue star", negative_prompt="red", sampler="heun"
    )
    request = GenerateRequest(
        prompt=FIRST["prompt"], seed=5, steps=3, width=64, height=48, guidance_scale=3.0, sampler="euler",
        schedule="simple", hires=hires,
    )  # fmt: skip
    (expected,) = generate(load(device="cpu"), request)
    assert result.image.size == (128, 96)
    assert result.image.convert("RGB").tobytes() == expected.image.tobytes()
    info = result.info
    assert (info["width"], info["height"], info["denoising_strength"]) == (64, 48, 0.6)
    told = info["extra_generation_params"]
    assert (told["Hires resize"], told["Hires upscaler"], told["Hires steps"]) == ("128x96", "Lanczos", 4)
    assert (told["Hires sampler"], told["Hires prompt"]) == ("Heun", "a blue star")
    assert "Hires resize: 128x96, Hires steps: 4, Hires upscaler: lanczos" in info["infotexts"][0]


def test_the_first_pass_alone_is_drawn_while_it_is_off(server: TestClient) -> None:
    """Clients send all their fields then, whatever they hold."""
    left_over = {"hr_upscaler": "ESRGAN_4x", "hr_scale": 99, "denoising_strength": 7, "hr_prompt": "x"}
    assert asked(server, enable_hr=False, **left_over) == {}


@pytest.mark.parametrize(
    ("fields", "hires"),
    [
        ({}, {"scale": 2.0}),
        ({"hr_scale": 1.5}, {"scale": 1.5}),
        ({"hr_resize_x": 128, "hr_resize_y": 96, "hr_scale": 3}, {"width": 128, "height": 96}),
        ({"hr_resize_x": 128}, {"width": 128}),
        ({"hr_second_pass_steps": 0, "hr_prompt": "", "hr_negative_prompt": " "}, {}),
        ({"hr_cfg": 2.0}, {"guidance_scale": 2.0}),
        ({"hr_sampler_name": "Use same sampler", "hr_scheduler": "Use same scheduler"}, {}),
        ({"hr_sampler_name": "DPM++ 2M Karras"}, {"sampler": "dpmpp_2m", "schedule": "karras"}),
        ({"scheduler": "Karras", "hr_scheduler": "Automatic"}, {"schedule": "simple"}),  # what suits the model
        ({"hr_checkpoint_name": "Use same checkpoint", "hr_additional_modules": ["Use same choices"]}, {}),
        ({"hr_upscaler": "latent-area"}, {"method": "latent-area"}),
    ],
)
def test_each_field_is_honoured(server: TestClient, fields: dict[str, Any], hires: dict[str, Any]) -> None:
    """What is left out is Octavo's own default."""
    usual = Hires(scale=2.0).settings
    if "width" in hires:
        del usual["scale"]
    assert asked(server, enable_hr=True, **fields) == usual | hires


def test_every_way_that_is_listed_is_taken_and_nothing_else(server: TestClient) -> None:
    lists = [server.get(f"/sdapi/v1/{name}").json() for name in ("upscalers", "latent-upscale-modes")]
    names = [each["name"] for entries in lists for each in entries]
    assert {"None", "Lanczos", "Nearest", "Latent", "Latent (bicubic)", "Latent (nearest-exact)"} <= set(names)
    methods = [asked(server, enable_hr=True, hr_upscaler=name)["method"] for name in names]
    assert len(set(methods)) == len(names) - 2  # None is Lanczos, and Latent the same with antialiasing
    for known in webuiapi.HiResUpscaler:
        answer = server.post("/sdapi/v1/txt2img", json={**FIRST, "enable_hr": True, "hr_upscaler": known.value})
        assert answer.status_code == (200 if known.value in names else 422), known
        if known.value not in names:
            assert "hr_upscaler" in answer.json()["detail"]


def test_antialiasing_changes_nothing_where_nothing_is_made_smaller() -> None:
    """Why "Latent (antialiased)" may be taken for "Latent": a difference of rounding alone."""
    x = torch.randn(1, 16, 6, 8, generator=torch.Generator().manual_seed(1))
    for size in ((12, 16), (7, 9), (6, 20)):
        theirs = torch.nn.functional.interpolate(x, size=size, mode="bilinear", antialias=True)
        torch.testing.assert_close(resize(x, size[1], size[0], "bilinear"), theirs, atol=4e-6, rtol=0)


@pytest.mark.parametrize(
    ("fields", "status", "word"),
    [
        ({"hr_checkpoint_name": "other.safetensors"}, 422, "hr_checkpoint_name"),
        ({"hr_additional_modules": ["ae.safetensors"]}, 422, "hr_additional_modules"),
        ({"hr_upscaler": "R-ESRGAN 4x+"}, 422, "hr_upscaler"),
        ({"firstphase_height": 64}, 422, "firstphase_height"),
        ({"hr_prompt": "a <hypernet:x:1>"}, 422, "hr_prompt"),
        ({"hr_prompt": "a star <lora:absent:1>"}, 404, "absent"),
        ({"hr_scale": 0.5}, 400, "scale"),
        ({"hr_scale": 9}, 400, "scale"),
        ({"hr_resize_x": 100}, 400, "use 96"),
        ({"hr_resize_x": 32, "hr_resize_y": 32}, 400, "smaller"),
        ({"hr_second_pass_steps": -1}, 400, "steps of hires"),
        ({"denoising_strength": 1.5}, 400, "denoise"),
        ({"hr_sampler_name": "No Such"}, 400, "No Such"),
        ({"hr_scheduler": "No Such"}, 400, "No Such"),
        ({"hr_prompt": "a" * 20_001}, 400, "20000 letters"),
        ({"hr_cfg": -1}, 400, "guidance_scale"),
        ({"hr_scale": "large"}, 422, "hr_scale"),
    ],
)
def test_what_is_not_done_is_refused_by_name(
    server: TestClient, fields: dict[str, Any], status: int, word: str
) -> None:
    answer = server.post("/sdapi/v1/txt2img", json={**FIRST, "enable_hr": True, **fields})
    assert answer.status_code == status, answer.text
    assert word in json.dumps(answer.json()["detail"])
    state = server.app.state.octavo  # type: ignore[attr-defined]
    assert state.queue.history("generate") == []


def test_the_enlarged_size_is_held_to_what_the_server_draws(make_server: MakeServer) -> None:
    server = make_server(max_pixels=128 * 128)
    small = {**FIRST, "width": 64, "height": 64, "enable_hr": True}
    assert server.post("/sdapi/v1/txt2img", json={**small, "hr_scale": 2}).status_code == 200
    answer = server.post("/sdapi/v1/txt2img", json={**small, "hr_scale": 2.25})
    assert answer.status_code == 400
    assert "144x144 is larger than the 16384 pixels" in answer.json()["detail"]


def test_pictures_to_start_from_have_no_hires_fix(server: TestClient) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "PNG")
    body = {**FIRST, "init_images": [base64.b64encode(buffer.getvalue()).decode()], "enable_hr": True}
    answer = server.post("/sdapi/v1/img2img", json=body)
    assert answer.status_code == 422
    assert "enable_hr" in json.dumps(answer.json())
