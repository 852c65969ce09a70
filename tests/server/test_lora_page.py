"""LoRAs on the page, in its API, and in those of others."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.lora_files import MMDIT_LAYERS, low_rank, write_lora
from tests.server.conftest import Live, MakeServer, listening, settings_in
from tests.server.test_page import CHROMIUM, FLAGS, SETTINGS, ask, ended


def put_lora(models_dir: Path) -> None:
    import octavo

    mmdit = octavo.load(device="cpu").mmdit.skeleton
    write_lora(models_dir / "loras" / "style.safetensors", mmdit=low_rank(mmdit, MMDIT_LAYERS, size=0.3))


@pytest.fixture
def server(make_server: MakeServer, tmp_path: Path) -> TestClient:
    put_lora(tmp_path / "models")
    return make_server(models_dir=tmp_path / "models")


def test_loras_are_listed_drawn_with_and_told(server: TestClient) -> None:
    assert server.get("/octavo/models").json()["loras"] == ["style.safetensors"]
    assert [each["name"] for each in server.get("/sdapi/v1/loras").json()] == ["style"]
    job = ended(server, ask(server, loras=[{"name": "style.safetensors", "strength": 0.5}])["id"])
    assert job["settings"]["loras"] == [{"name": "style.safetensors", "strength": 0.5}]
    by_prompt = ended(server, ask(server, prompt="a red star <lora:style:0.25>")["id"])
    assert by_prompt["settings"]["loras"] == [{"name": "style", "strength": 0.25}]
    assert by_prompt["settings"]["prompt"] == "a red star"


@pytest.mark.parametrize(
    ("wish", "status", "message"),
    [
        ({"loras": [{"name": "nothing"}]}, 404, "There is no LoRA 'nothing'"),
        ({"prompt": "a star <lora:../style>"}, 404, "There is no LoRA '../style'"),
        ({"prompt": "a star <lora:style:much>"}, 400, "'much' is not a number"),
        ({"loras": [{"name": "style", "strength": 101}]}, 422, ""),
    ],
)
def test_what_cannot_be_used_is_refused_at_once(
    server: TestClient, wish: dict[str, Any], status: int, message: str
) -> None:
    answer = server.post("/octavo/jobs", json={**SETTINGS, **wish})
    assert answer.status_code == status
    assert message in answer.text


def test_other_apis_take_them_in_the_prompt(server: TestClient) -> None:
    size = {"width": 64, "height": 64, "steps": 1}
    answer = server.post("/sdapi/v1/txt2img", json={"prompt": "a red star <lora:style:0.5>", "seed": 1, **size})
    assert answer.status_code == 200, answer.text
    assert "<lora:style:0.5>" in json.loads(answer.json()["info"])["infotexts"][0]
    answer = server.post("/v1/images/generations", json={"prompt": "a star <lora:style>", "size": "64x64"})
    assert answer.status_code == 200, answer.text
    for path, asked in (("/sdapi/v1/txt2img", size), ("/v1/images/generations", {"size": "64x64"})):
        for tag, status in (("<lora:nothing>", 404), ("<lora:style:much>", 400)):
            answer = server.post(path, json={"prompt": f"a star {tag}", **asked})
            assert answer.status_code == status, answer.text


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Live]:
    put_lora(tmp_path / "models")
    with listening(settings_in(tmp_path)) as live:
        yield live


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_one_is_picked_weighed_and_used_again_in_a_browser(live: Live) -> None:
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        page = browser.new_page()
        page.goto(live.url)
        page.wait_for_selector("#lora-names option[value='style.safetensors']", state="attached")
        page.select_option("#lora-names", "style.safetensors")
        page.fill("#loras input", "0.6")
        page.fill("[name=prompt]", "a red star")
        page.click("button.main")
        page.wait_for_selector("#about p:has-text('with style.safetensors 0.6')")
        page.click("#loras button")
        assert page.locator("#loras li").count() == 0
        page.click("text=Use these")
        assert page.input_value("#loras input") == "0.6"
        browser.close()
