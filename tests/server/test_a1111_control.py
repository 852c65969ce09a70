"""ControlNet as clients of AUTOMATIC1111's extension ask for it."""

import base64
import io
from typing import Any

import pytest
import webuiapi
from PIL import Image, ImageDraw
from starlette.testclient import TestClient

from octavo.evaluate.edges import edge_agreement
from octavo.pipeline.edges import canny
from octavo.pipeline.latents import pixels_of
from tests.server.conftest import Live


def photo(size: tuple[int, int] = (128, 128)) -> Image.Image:
    image = Image.new("RGB", size, "white")
    ImageDraw.Draw(image).polygon([(20, 100), (44, 24), (70, 60), (108, 70), (90, 108)], fill="black")
    return image


def in_base64(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def unit(**changes: Any) -> dict[str, Any]:
    args = {"module": "canny", "model": "None", "image": in_base64(photo())} | changes
    return {
        "prompt": "red on a white background", "width": 128, "height": 128, "steps": 1,
        "alwayson_scripts": {"ControlNet": {"args": [args]}},
    }  # fmt: skip


def test_webuiapi_s_units_make_the_picture_follow(live_model: Live) -> None:
    client = webuiapi.WebUIApi(port=live_model.port)
    (name,) = client.controlnet_model_list()
    assert (name, client.controlnet_module_list(), client.controlnet_version()) == (
        "octavo-demo-canny",
        ["none", "canny"],
        3,
    )
    told = {"prompt": "red on a white background", "seed": 3, "width": 128, "height": 128}
    thresholds = {"threshold_a": 100, "threshold_b": 200}
    with_net = webuiapi.ControlNetUnit(image=photo(), module="canny", model=f"{name} [abc]", **thresholds)
    wanted = canny((pixels_of(photo()) + 1) / 2, 0.4, 0.8)
    scores = []
    for units in ([with_net], []):
        # A dict of its own: the client keeps units in its default one for all calls that follow.
        drawn = client.txt2img(**told, controlnet_units=units, alwayson_scripts={}).image.convert("RGB")
        scores.append(float(edge_agreement(canny((pixels_of(drawn) + 1) / 2, 0.4, 0.8), wanted)))
    assert scores[0] > 0.8
    assert scores[1] < 0.4


def test_what_a_unit_asks_arrives_as_it_is_meant(server: TestClient) -> None:
    edges = {"module": "none", "model": "octavo-demo-canny", "weight": 0.7, "guidance_end": 0.6, "enabled": True}
    assert server.post("/sdapi/v1/txt2img", json=unit(**edges)).status_code == 200
    assert server.post("/sdapi/v1/txt2img", json=unit(threshold_a=51, threshold_b=102)).status_code == 200
    start = {"init_images": [in_base64(photo())], "denoising_strength": 0.5}
    assert server.post("/sdapi/v1/img2img", json=unit(image=None) | start).status_code == 200
    assert server.post("/sdapi/v1/txt2img", json=unit(enabled=False, module="openpose")).status_code == 200
    jobs = server.app.state.octavo.queue.history("generate")  # type: ignore[attr-defined]
    off, of_start, found, plain = (job.payload["request"] for job in jobs)
    assert "controls" not in off
    assert of_start["controls"][0]["image"] == of_start["image"]
    ((first,), (second,)) = plain["controls"], found["controls"]
    assert {name: value for name, value in first.items() if name != "image"} == {
        "model": "octavo-demo-canny.safetensors", "strength": 0.7, "end": 0.6, "low": 100 / 255, "high": 200 / 255,
    }  # fmt: skip
    assert (second["type"], second["preprocess"], second["low"], second["high"]) == ("canny", "canny", 0.2, 0.4)


@pytest.mark.parametrize(
    ("changes", "status", "said"),
    [
        ({"module": "openpose"}, 422, "no preprocessor 'openpose'"),
        ({"control_mode": "ControlNet is more important"}, 422, "use 'Balanced'"),
        ({"mask": "x"}, 422, "masks of ControlNet units"),
        ({"weight": 20}, 422, "weight"),
        ({"guidance_start": 0.8, "guidance_end": 0.2}, 400, "start < end"),
        ({"model": "../../etc/passwd"}, 404, "no ControlNet '../../etc/passwd'"),
        ({"image": None}, 422, "no image"),
        ({"image": "$$$"}, 400, "alwayson_scripts"),
        ({"module": "none"}, 422, "neither model nor preprocessor"),
        ({"image": in_base64(photo((128, 64))), "resize_mode": "Just Resize"}, 422, "only 'Crop and Resize'"),
    ],
)
def test_what_is_not_done_is_refused_with_a_reason(
    server: TestClient, changes: dict[str, Any], status: int, said: str
) -> None:
    answer = server.post("/sdapi/v1/txt2img", json=unit(**changes))
    assert (answer.status_code, said in answer.text) == (status, True), answer.text
