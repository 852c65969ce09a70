"""AUTOMATIC1111's API, asked by the `webuiapi` client, and field by field."""

import base64
import io
import json
import struct
import threading
import zlib
from typing import Any

import pytest
import webuiapi
from PIL import Image, ImageChops, ImageDraw
from starlette.testclient import TestClient

from octavo.pipeline.image import read_settings
from tests.server.conftest import Live, MakeServer, listening, settings_in, until


@pytest.fixture
def client(live: Live) -> webuiapi.WebUIApi:
    return webuiapi.WebUIApi(port=live.port)


def in_base64(image: Image.Image, form: str = "PNG") -> str:
    buffer = io.BytesIO()
    image.save(buffer, form)
    return base64.b64encode(buffer.getvalue()).decode()


def first_image(answer: Any) -> Image.Image:
    assert answer.status_code == 200, answer.text
    return Image.open(io.BytesIO(base64.b64decode(answer.json()["images"][0])))


def test_txt2img_draws_batches_with_seeds_that_count_up(client: webuiapi.WebUIApi) -> None:
    result = client.txt2img(
        prompt="a star", negative_prompt="a circle", seed=7, batch_size=2, n_iter=2, steps=3, width=96, height=64,
        cfg_scale=3.5, sampler_name="DPM++ 2M", scheduler="Karras",
    )  # fmt: skip
    assert [image.size for image in result.images] == [(96, 64)] * 4
    assert [image.getpixel((0, 0))[0] for image in result.images] == [7, 8, 9, 10]
    info = result.info
    assert info["all_seeds"] == [7, 8, 9, 10]
    assert info["all_prompts"] == ["a star"] * 4
    assert (info["sampler_name"], info["steps"], info["cfg_scale"]) == ("DPM++ 2M", 3, 3.5)
    assert info["infotexts"][1].splitlines()[:2] == ["a star", "Negative prompt: a circle"]
    assert "Steps: 3, Sampler: dpmpp_2m, Schedule type: karras, CFG scale: 3.5, Seed: 8" in info["infotexts"][1]
    assert result.parameters["seed"] == 7


def test_its_defaults_draw(client: webuiapi.WebUIApi) -> None:
    """webuiapi sends every field; those that Octavo does not honour have the value that changes nothing."""
    assert client.txt2img(prompt="a star").image.size == (512, 512)
    picture = Image.new("RGB", (128, 128), "red")
    mask = Image.new("L", (128, 128), 255)
    assert client.img2img(images=[picture], prompt="a star", width=128, height=128).image.size == (128, 128)
    assert client.img2img(images=[picture], mask_image=mask, prompt="a star", width=128, height=128).image.size == (
        128,
        128,
    )


def test_what_is_looked_up(client: webuiapi.WebUIApi) -> None:
    assert {"Euler a", "DPM++ 2M SDE"} <= set(client.util_get_sampler_names())
    assert {"automatic", "karras"} <= set(client.util_get_scheduler_names())
    assert client.util_get_current_model() == "octavo-demo"
    client.util_set_model("octavo-demo-fp8.safetensors")
    assert client.util_get_current_model() == "octavo-demo-fp8.safetensors"
    assert client.get_memory()["ram"]["total"] > 0
    client.util_wait_for_ready()
    for nothing in (client.get_hypernetworks, client.get_face_restorers, client.get_prompt_styles, client.get_loras,
                    client.get_realesrgan_models, client.get_cmd_flags):  # fmt: skip
        assert not nothing()
    assert client.get_embeddings()["loaded"] == {}
    assert client.refresh_checkpoints() is None
    assert client.get_sd_vae() is not None


def test_a_picture_tells_its_settings(client: webuiapi.WebUIApi) -> None:
    picture = client.txt2img(prompt='a "star", large: really', negative_prompt="x", seed=3, steps=2).image
    answer = client.session.post(f"{client.baseurl}/png-info", json={"image": webuiapi.b64_img(picture)}).json()
    assert answer["info"].startswith('a "star", large: really\nNegative prompt: x\nSteps: 2, ')
    assert answer["parameters"]["Prompt"] == 'a "star", large: really'
    assert (answer["parameters"]["Negative prompt"], answer["parameters"]["Seed"]) == ("x", "3")
    plain = client.session.post(f"{client.baseurl}/png-info", json={"image": in_base64(Image.new("L", (8, 8)))}).json()
    assert (plain["info"], plain["parameters"]) == ("", {})


def test_progress_and_interrupt(live: Live, client: webuiapi.WebUIApi) -> None:
    failures: list[Exception] = []

    def draw() -> None:
        try:
            client.txt2img(prompt="slow 500")
        except RuntimeError as error:
            failures.append(error)

    thread = threading.Thread(target=draw)
    thread.start()
    until(lambda: client.get_progress()["state"]["sampling_step"] > 2, "it draws")
    seen = client.get_progress()
    assert 0 < seen["progress"] < 1
    assert seen["state"]["job_count"] == 1
    assert Image.open(io.BytesIO(base64.b64decode(seen["current_image"]))).size == (8, 8)
    client.interrupt()
    thread.join(20)
    assert not thread.is_alive()
    assert failures[0].args[0] == 409
    assert client.get_progress()["progress"] == 0
    assert live.state.queue.history("generate")[0].state == "cancelled"


def test_a_client_that_leaves_takes_its_request_along(live: Live) -> None:
    import socket

    body = json.dumps({"prompt": "slow 500"}).encode()
    with socket.create_connection(("127.0.0.1", live.port)) as line:
        head = f"POST /sdapi/v1/txt2img HTTP/1.1\r\nHost: 127.0.0.1:{live.port}\r\nContent-Type: application/json\r\n"
        line.sendall(head.encode() + b"Content-Length: %d\r\n\r\n%b" % (len(body), body))
        until(lambda: len(live.state.queue.running()) == 1, "it draws")
    until(lambda: not live.state.queue.running(), "it is withdrawn")
    assert live.state.queue.history("generate")[0].state == "cancelled"


def test_basic_auth_opens_with_the_key_as_password(tmp_path: Any) -> None:
    with listening(settings_in(tmp_path, api_keys=("a-key-of-enough-letters",))) as live:
        good = webuiapi.WebUIApi(port=live.port, username="anyone", password="a-key-of-enough-letters")
        assert good.get_options()["samples_format"] == "png"
        bad = webuiapi.WebUIApi(port=live.port, username="anyone", password="a-key-of-other-letters")
        assert bad.session.get(f"{bad.baseurl}/options").status_code == 401


REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("firstphase_width", {"enable_hr": True, "firstphase_width": 512}),
    ("subseed_strength", {"subseed_strength": 0.1}), ("styles", {"styles": ["x"]}),
    ("restore_faces", {"restore_faces": True}), ("tiling", {"tiling": True}), ("eta", {"eta": 0.3}),
    ("s_churn", {"s_churn": 1}), ("s_noise", {"s_noise": 1.01}), ("script_name", {"script_name": "x/y/z plot"}),
    ("alwayson_scripts", {"alwayson_scripts": {"ADetailer": {"args": [{"ad_model": "x"}]}}}),
    ("refiner_checkpoint", {"refiner_checkpoint": "x"}), ("no_such_field", {"no_such_field": 1}),
    ("prompt", {"prompt": "a <hypernet:x:1> star"}), ("seed_resize_from_w", {"seed_resize_from_w": 512}),
    ("return_grid", {"override_settings": {"return_grid": True}}), ("eh", {"override_settings": {"eh": 1}}),
    ("CLIP_stop_at_last_layers", {"override_settings": {"CLIP_stop_at_last_layers": "two"}}),
]  # fmt: skip


def test_what_is_not_honoured_is_refused_by_name(server: TestClient) -> None:
    for field, more in REFUSED:
        answer = server.post("/sdapi/v1/txt2img", json={"prompt": "a star", **more})
        assert answer.status_code == 422, more
        assert field in answer.json()["detail"], (more, answer.text)
    state = server.app.state.octavo  # type: ignore[attr-defined]
    assert state.queue.depth() == {"queued": 0, "running": 0}


def test_bad_values_are_4xx_with_a_reason(server: TestClient) -> None:
    picture = in_base64(Image.new("RGB", (16, 16)))
    for path, body, status in [
        ("txt2img", {"prompt": ""}, 400),
        ("txt2img", {"prompt": "a", "sampler_name": "No Such"}, 400),
        ("txt2img", {"prompt": "a", "width": 100}, 400),
        ("txt2img", {"prompt": "a", "steps": "many"}, 422),
        ("txt2img", {"prompt": "a", "override_settings": {"sd_model_checkpoint": "/etc/passwd"}}, 404),
        ("img2img", {"prompt": "a"}, 422),
        ("img2img", {"prompt": "a", "init_images": ["http://example.com/a.png"]}, 400),
        ("img2img", {"prompt": "a", "init_images": ["$$$"]}, 400),
        ("img2img", {"prompt": "a", "init_images": ["aGVsbG8="]}, 400),
        ("img2img", {"prompt": "a", "init_images": [picture], "mask": in_base64(Image.new("L", (16, 16), 0))}, 400),
        ("img2img", {"prompt": "a", "init_images": [picture], "inpainting_fill": 2}, 422),
        ("png-info", {"image": "file:///etc/passwd"}, 400),
        ("skip", {}, 422),
    ]:  # fmt: skip
        answer = server.post(f"/sdapi/v1/{path}", json=body)
        assert answer.status_code == status, (path, body, answer.text)
        assert answer.json()["detail"]


def test_a_decompression_bomb_is_refused_by_its_header(server: TestClient) -> None:
    small = io.BytesIO()
    Image.new("L", (8, 8)).save(small, "PNG")
    for width, height in ((10_000, 8_000), (60_000, 60_000)):
        header = b"IHDR" + struct.pack(">II", width, height) + bytes((8, 0, 0, 0, 0))
        bomb = small.getvalue()[:12] + header + struct.pack(">I", zlib.crc32(header)) + small.getvalue()[33:]
        text = base64.b64encode(bomb).decode()
        answer = server.post("/sdapi/v1/img2img", json={"prompt": "a", "init_images": [text]})
        assert answer.status_code == 400
        assert "larger than the 50000000 pixels" in answer.json()["detail"]


def test_inpainting_leaves_what_is_outside_the_mask(server: TestClient) -> None:
    picture = Image.linear_gradient("L").resize((96, 64)).convert("RGB")
    mask = Image.new("L", (96, 64), 0)
    ImageDraw.Draw(mask).rectangle((16, 16, 47, 47), fill=255)
    body = {
        "prompt": "a star", "seed": 200, "width": 96, "height": 64, "init_images": [in_base64(picture)],
        "mask": in_base64(mask), "mask_blur": 0, "denoising_strength": 1.0,
    }  # fmt: skip
    for only_masked in (False, True):
        for inverted in (0, 1):
            more = {"inpaint_full_res": only_masked, "inpainting_mask_invert": inverted}
            edited = first_image(server.post("/sdapi/v1/img2img", json=body | more)).convert("RGB")
            changed = ImageChops.difference(edited, picture).convert("L").point(lambda value: 255 * (value > 0))
            box = (16, 16, 48, 48)
            assert edited.getpixel((30, 30) if not inverted else (2, 2)) == (200, 0, 77)
            if inverted:
                assert changed.crop(box).getbbox() is None
            else:
                assert changed.getbbox() == box


def test_the_picture_that_is_given_back_carries_its_settings(server: TestClient, tmp_path: Any) -> None:
    images = {"init_images": [in_base64(Image.new("RGB", (64, 64)))], "mask": in_base64(Image.new("L", (64, 64), 255))}
    body = {"prompt": "a star", "seed": 5, "width": 64, "height": 64, **images}
    answer = server.post("/sdapi/v1/img2img", json=body)
    (tmp_path / "back.png").write_bytes(base64.b64decode(answer.json()["images"][0]))
    settings = read_settings(tmp_path / "back.png")
    assert (settings["prompt"], settings["seed"]) == ("a star", 5)


def test_an_option_holds_for_its_caller_only(make_server: MakeServer) -> None:
    server = make_server(api_keys=("the-first-key-of-two", "the-second-key-of-two"))
    first, second = ({"X-API-Key": f"the-{which}-key-of-two"} for which in ("first", "second"))
    assert server.post("/sdapi/v1/options", json={"samples_format": "webp"}, headers=first).status_code == 200
    forms = [
        first_image(server.post("/sdapi/v1/txt2img", json={"prompt": "a"}, headers=who)).format
        for who in (first, second)
    ]
    assert forms == ["WEBP", "PNG"]
    once = {"prompt": "a", "override_settings": {"samples_format": "jpg"}}
    assert first_image(server.post("/sdapi/v1/txt2img", json=once, headers=first)).format == "JPEG"
    assert server.get("/sdapi/v1/options", headers=first).json()["samples_format"] == "webp"


def test_odd_json_is_refused_or_harmless(server: TestClient) -> None:
    def sent(text: str) -> int:
        headers = {"Content-Type": "application/json"}
        return server.post("/sdapi/v1/txt2img", content=text.encode(), headers=headers).status_code

    assert sent('{"prompt": "a", "s_tmax": Infinity}') == 200
    for text in (
        "[" * 100_000, '{"a":' * 5000, '{"prompt": "a", "seed": ' + "9" * 5000 + "}",
        '{"prompt": "a", "cfg_scale": NaN}',
        '{"prompt": "\\ud800"}', "null", "[]", '{"prompt": null}', '{"prompt": "a", "s_noise": NaN}', "", "\x00", "{",
        '{"prompt": "a", "steps": 1e999}', '{"prompt": "' + "a" * 20_001 + '"}', '{"prompt": "a", "seed": -2}',
        '{"prompt": "a", "batch_size": 9, "n_iter": 9}', '{"prompt": "a", "width": 16384, "height": 16384}',
    ):  # fmt: skip
        assert sent(text) in (400, 422), text[:50]
