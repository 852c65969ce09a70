"""OpenAI's images API, asked by OpenAI's own client."""

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from PIL import Image, ImageDraw
from starlette.testclient import TestClient

from octavo import GenerateRequest, generate, load
from octavo.evaluate.edges import edge_agreement
from octavo.pipeline.edges import canny
from octavo.pipeline.hires import Hires
from octavo.pipeline.latents import pixels_of
from tests.server.conftest import Live, MakeServer, listening, settings_in


@pytest.fixture
def client(live: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0, timeout=30) as found:
        yield found


def opened(text: str | None) -> Image.Image:
    assert text is not None
    image = Image.open(io.BytesIO(base64.b64decode(text)))
    image.load()
    return image


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_a_picture_of_the_size_and_number_asked_for(client: openai.OpenAI) -> None:
    answer = client.images.generate(prompt="a star", size="96x64", n=2, extra_body={"seed": 7})  # type: ignore[call-overload]
    images = [opened(each.b64_json) for each in answer.data]
    assert [image.size for image in images] == [(96, 64)] * 2
    assert [image.getpixel((0, 0))[:2] for image in images] == [(7, 0), (8, 1)]
    assert answer.size == "96x64"
    assert answer.output_format == "png"


@pytest.mark.parametrize("form", ["png", "jpeg", "webp"])
def test_the_format_asked_for(client: openai.OpenAI, form: str) -> None:
    answer = client.images.generate(prompt="a star", output_format=form)  # type: ignore[call-overload]
    assert opened(answer.data[0].b64_json).format == form.upper()


def test_compression_makes_the_file_smaller(client: openai.OpenAI) -> None:
    sizes = [
        len(client.images.generate(prompt="a", output_format="jpeg", output_compression=quality).data[0].b64_json)  # type: ignore[call-overload]
        for quality in (5, 95)
    ]
    assert sizes[0] < sizes[1]


def test_an_address_opens_without_a_key_and_only_as_given(tmp_path: Path) -> None:
    key = "a-key-of-enough-letters"
    with listening(settings_in(tmp_path, api_keys=(key,))) as live:
        with openai.OpenAI(base_url=f"{live.url}/v1", api_key=key, max_retries=0) as client:
            url = client.images.generate(prompt="a star", response_format="url").data[0].url
        assert url is not None
        found = httpx.get(url)
        assert found.status_code == 200
        assert Image.open(io.BytesIO(found.content)).size == (64, 64)
        name = url.rpartition("/")[2]
        assert httpx.get(url.replace(name, "../data/keys.json")).status_code in (401, 404)
        assert httpx.get(url[:-5] + "x" + url[-4:]).status_code == 401
        signature = url.split("/")[-2]
        assert httpx.get(url.replace(signature, "9" + signature[1:])).status_code == 401


def test_a_stream_of_partial_pictures_ends_with_the_picture(client: openai.OpenAI) -> None:
    stream = client.images.generate(prompt="a star", stream=True, partial_images=2, extra_body={"steps": 6, "seed": 1})
    events = list(stream)
    kinds = [event.type for event in events]
    assert kinds == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert [event.partial_image_index for event in events[:-1]] == [0, 1]  # type: ignore[union-attr]
    assert opened(events[-1].b64_json).size == (64, 64)
    assert opened(events[0].b64_json).format == "PNG"


def test_a_failure_within_a_stream_is_an_error_of_the_client(client: openai.OpenAI) -> None:
    stream = client.images.generate(prompt="fail", stream=True)
    with pytest.raises(openai.APIError, match="Internal error"):
        list(stream)


def test_an_edit_changes_only_what_the_mask_leaves_transparent(client: openai.OpenAI) -> None:
    picture = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
    mask = Image.new("RGBA", (64, 64), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (0, 0, 32, 64))
    answer = client.images.edit(
        image=("in.png", png(picture), "image/png"),
        mask=("mask.png", png(mask), "image/png"),
        prompt="a star",
        size="64x64",
        extra_body={"seed": 200},
    )
    assert answer.data is not None
    edited = opened(answer.data[0].b64_json)
    assert edited.crop((32, 0, 64, 64)).tobytes() == picture.crop((32, 0, 64, 64)).tobytes()
    assert edited.getpixel((5, 60)) == (200, 0, 77)


def test_an_edit_takes_the_shape_of_its_picture(client: openai.OpenAI) -> None:
    answer = client.images.edit(image=[("a.png", png(Image.new("RGB", (400, 200))), "image/png")], prompt="a star")
    assert answer.data is not None
    width, height = opened(answer.data[0].b64_json).size
    assert (width % 16, height % 16, round(width / height)) == (0, 0, 2)


def test_models_are_listed_and_found(client: openai.OpenAI) -> None:
    names = [model.id for model in client.models.list()]
    assert names[0] == "octavo-demo"
    assert client.models.retrieve("octavo-demo").object == "model"
    with pytest.raises(openai.NotFoundError, match="There is no model 'gpt-image-1'"):
        client.images.generate(prompt="a star", model="gpt-image-1")
    for path in ("/etc/passwd", "../../secret", str(Path(__file__))):
        with pytest.raises(openai.NotFoundError):
            client.images.generate(prompt="a star", model=path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("size", "1000x1000"), ("size", "huge"), ("size", "99999x16"), ("n", 11), ("background", "transparent"),
        ("style", "vivid"), ("quality", "ultra"), ("output_format", "gif"), ("output_compression", 5),
        ("partial_images", 1), ("sampler", "no such"), ("prompt", " "), ("no_such_field", 1), ("model", "sd9"),
    ],
)  # fmt: skip
def test_what_is_not_done_is_refused_in_openais_shape(server: TestClient, field: str, value: object) -> None:
    answer = server.post("/v1/images/generations", json={"prompt": "a star", field: value})
    error = answer.json()["error"]
    assert answer.status_code in (400, 404)
    assert error["type"] == "invalid_request_error"
    assert field in error["message"] or field in (error["param"] or "") or str(value) in error["message"]


def test_a_picture_larger_than_the_server_draws_is_refused(make_server: MakeServer) -> None:
    server = make_server(max_pixels=64 * 64)
    sizes = {"64x64": 200, "80x64": 400, "65536x65536": 400, "auto": 400}  # the embedded model's own size is larger
    for size, status in sizes.items():
        assert server.post("/v1/images/generations", json={"prompt": "a", "size": size}).status_code == status


def test_a_picture_by_address_is_not_fetched(server: TestClient) -> None:
    answer = server.post(
        "/v1/images/edits", files={"prompt": (None, "a star"), "image": (None, "https://example.com/a.png")}
    )
    assert answer.status_code == 400
    assert "fetches nothing" in answer.json()["error"]["message"]


def test_a_wrong_key_is_an_authentication_error(tmp_path: Path) -> None:
    with (
        listening(settings_in(tmp_path, api_keys=("a-key-of-enough-letters",))) as live,
        openai.OpenAI(base_url=f"{live.url}/v1", api_key="another", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError, match="not known"),
    ):
        client.models.list()


def test_a_full_queue_is_a_rate_limit_with_a_time_to_wait(make_server: MakeServer) -> None:
    from tests.server.conftest import until

    server = make_server(workers=1, queue_limit=1)
    state = server.app.state.octavo  # type: ignore[attr-defined]
    payload = {"request": {"prompt": "slow 200"}, "model": None, "format": "png"}
    state.service.submit("generate", payload)
    until(lambda: len(state.queue.running()) == 1, "the worker is busy")
    state.service.submit("generate", payload)
    answer = server.post("/v1/images/generations", json={"prompt": "a star"})
    assert answer.status_code == 429
    assert int(answer.headers["Retry-After"]) >= 1
    assert answer.json()["error"]["type"] == "rate_limit_error"
    for job in (*state.queue.running(), *state.queue.pending()):
        state.service.cancel(job.id)


def test_the_same_request_sent_twice_is_drawn_once(server: TestClient) -> None:
    body = {"prompt": "a star", "seed": 5}
    first, second = (
        server.post("/v1/images/generations", json=body, headers={"Idempotency-Key": "k1"}) for _ in range(2)
    )
    assert first.json() == second.json()
    state = server.app.state.octavo  # type: ignore[attr-defined]
    assert len(state.queue.history("generate")) == 1
    other = server.post("/v1/images/generations", json={"prompt": "b"}, headers={"Idempotency-Key": "k1"})
    assert other.status_code == 409


def test_a_request_that_takes_too_long_is_given_up(server: TestClient) -> None:
    answer = server.post("/v1/images/generations", json={"prompt": "slow 500"}, headers={"X-Octavo-Timeout": "0.2"})
    assert answer.status_code == 408
    assert "deadline" in json.dumps(answer.json()).lower()
    for text in ("soon", "-1", "nan", "0"):
        answer = server.post("/v1/images/generations", json={"prompt": "a"}, headers={"X-Octavo-Timeout": text})
        assert answer.status_code == 400


def test_a_stream_whose_reader_leaves_ends_the_request(live: Live) -> None:
    from tests.server.conftest import until

    body = {"prompt": "slow 500", "stream": True}
    with httpx.stream("POST", f"{live.url}/v1/images/generations", json=body) as answer:
        assert answer.status_code == 200
        until(lambda: len(live.state.queue.running()) == 1, "it draws")
    until(lambda: not live.state.queue.running(), "it is withdrawn")
    assert live.state.queue.history("generate")[0].state == "cancelled"


def scrap() -> Image.Image:
    """A five-cornered thing that no word of the model says."""
    photo = Image.new("RGB", (128, 128), "white")
    ImageDraw.Draw(photo).polygon([(20, 100), (44, 24), (70, 60), (108, 70), (90, 108)], fill="black")
    return photo


def test_a_picture_is_followed_and_so_are_loras_with_the_real_model(live_model: Live) -> None:
    """By edges alone: with control the scrap is there, without it is not; the docs promise 0.8 against 0.4."""

    def agreement(text: str | None) -> float:
        found, wanted = (canny((pixels_of(each.convert("RGB")) + 1) / 2, 0.4, 0.8) for each in (opened(text), scrap()))
        return float(edge_agreement(found, wanted))

    edges = {"image": base64.b64encode(png(scrap())).decode(), "type": "canny", "preprocess": "canny"}
    asked = {"prompt": "red on a white background", "size": "128x128"}
    with openai.OpenAI(base_url=f"{live_model.url}/v1", api_key="none", max_retries=0, timeout=30) as client:
        followed = client.images.generate(**asked, extra_body={"seed": 3, "controls": [edges]})  # type: ignore[call-overload]
        free = client.images.generate(**asked, extra_body={"seed": 3})  # type: ignore[call-overload]
        assert agreement(followed.data[0].b64_json) > 0.8
        assert agreement(free.data[0].b64_json) < 0.4

        # An edit follows its own picture where the control has none
        files = {"image": ("in.png", png(scrap()), "image/png"), "prompt": "blue on a white background"}
        own = json.dumps([{"type": "canny", "preprocess": "canny"}])
        edited = client.images.edit(**files, size="128x128", extra_body={"seed": 3, "denoise": 1.0, "controls": own})  # type: ignore[call-overload]
        assert agreement(edited.data[0].b64_json) > 0.8

        with pytest.raises(openai.NotFoundError, match="no ControlNet for depth"):
            client.images.generate(**asked, extra_body={"controls": [{**edges, "type": "depth"}]})  # type: ignore[call-overload]
        with pytest.raises(openai.NotFoundError, match="no LoRA 'absent'"):
            client.images.generate(**asked, extra_body={"loras": [{"name": "absent"}]})  # type: ignore[call-overload]
        with pytest.raises(openai.BadRequestError, match=r"json\.dumps"):
            client.images.edit(**files, extra_body={"controls": [{"type": "canny"}]})  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ({"controls": [{"type": "canny"}]}, "send the picture to follow"),
        ({"controls": [{"type": "canny", "image": "https://elsewhere/photo.png"}]}, "fetches nothing"),
        ({"controls": [{"type": "canny", "image": "bm8gcGljdHVyZQ=="}]}, "controls[0].image"),
        ({"controls": [{"type": "canny", "image": "QQ==", "strength": 11}]}, "strength"),
        ({"controls": [{"kind": "canny"}]}, "kind"),
        ({"controls": "not json"}, "JSON"),
        ({"loras": [{"strength": 1}]}, "name"),
    ],
)
def test_controls_and_loras_that_make_no_sense_are_refused(
    server: TestClient, wrong: dict[str, object], word: str
) -> None:
    answer = server.post("/v1/images/generations", json={"prompt": "a star", **wrong})
    assert answer.status_code == 400, answer.text
    assert word in answer.json()["error"]["message"] or word in (answer.json()["error"]["param"] or "")


def test_a_key_stands_for_what_the_client_said_and_not_for_what_was_filled_in(tmp_path: Path) -> None:
    """The same request after a restart with other defaults is the same; another one is not."""
    asked = [
        ("/v1/images/generations", {"prompt": "a star"}),
        ("/sdapi/v1/txt2img", {"prompt": "a star", "seed": 3}),
        ("/octavo/jobs", {"prompt": "a star"}),
    ]
    for i, (path, body) in enumerate(asked):
        keyed = {"Idempotency-Key": f"mine-{i}"}
        for speed in ("exact", "fast"):
            with listening(settings_in(tmp_path, speed=speed)) as live:
                answer = httpx.post(f"{live.url}{path}", json=body, headers=keyed)
                assert answer.status_code in (200, 201), answer.text
                other = httpx.post(f"{live.url}{path}", json={**body, "prompt": "a heart"}, headers=keyed)
                assert other.status_code == 409


def test_a_second_pass_makes_the_picture_larger(live_model: Live) -> None:
    """The very picture of `generate`; the answer tells the size that it has."""
    with openai.OpenAI(base_url=f"{live_model.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        wish = {"seed": 3, "steps": 3, "hires": {"scale": 1.5, "denoise": 0.3, "steps": 2, "method": "latent-bislerp"}}
        prompt = "a red star on a blue background"
        answer = client.images.generate(prompt=prompt, size="96x64", extra_body=wish)  # type: ignore[call-overload]
    hires = Hires(scale=1.5, denoise=0.3, steps=2, method="latent-bislerp")
    request = GenerateRequest(prompt=prompt, width=96, height=64, seed=3, steps=3, hires=hires)
    (expected,) = generate(load(device="cpu"), request)
    assert answer.size == "144x96"
    assert opened(answer.data[0].b64_json).convert("RGB").tobytes() == expected.image.tobytes()


@pytest.mark.parametrize(
    ("hires", "word"),
    [
        ({"scale": 9}, "scale"),
        ({"method": "ESRGAN_4x"}, "upscaling models"),
        ({"width": 100}, "use 96"),
        ({"denoise": "much"}, "denoise"),
        ({"sclae": 2}, "sclae"),
        ({"sampler": "eular"}, "euler"),
        ("2", "hires"),
        ({"width": 1024}, "1024x"),
    ],
)
def test_a_second_pass_that_makes_no_sense_is_refused(make_server: MakeServer, hires: object, word: str) -> None:
    server = make_server(max_pixels=512 * 512)
    answer = server.post("/v1/images/generations", json={"prompt": "a", "size": "64x64", "hires": hires})
    assert answer.status_code == 400, answer.text
    assert word in answer.json()["error"]["message"]


def test_an_edit_has_no_second_pass(server: TestClient) -> None:
    files = {"image": ("x.png", png(Image.new("RGB", (64, 64))), "image/png")}
    form = {"prompt": "a star", "hires": json.dumps({"scale": 2})}
    answer = server.post("/v1/images/edits", data=form, files=files)
    assert answer.status_code == 400
    assert "second pass" in answer.json()["error"]["message"]
    answer = server.post("/v1/images/edits", data={"prompt": "a star", "hires[scale]": "2"}, files=files)
    assert (answer.status_code, "json.dumps" in answer.text) == (400, True)
