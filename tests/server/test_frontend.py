"""ComfyUI's own page, in a browser: it opens at /comfy/, draws with the embedded model, and keeps what is saved."""

import json
import shutil
from collections.abc import Iterator
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from octavo.graph.frontend import to_prompt
from octavo.graph.nodes import NODES
from octavo.graph.workflow import validate
from octavo.server.comfy import frontend
from tests.goldens import ROOT
from tests.graph.compare import FixedLists
from tests.server.conftest import Live, MakeServer

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
ARGUMENTS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
PATIENCE = 60_000  # ms
# Lines in the browser's console that ComfyUI's own server causes, too, or that say that nothing outside was reached.
HARMLESS = (
    "status of 404", "user.css", "Content Security Policy", "deprecated", "Invalid layout total size", "ERR_ABORTED",
)  # fmt: skip

NEED_A_PICTURE = {"img2img", "inpaint"}  # of their user's

installed = pytest.mark.skipif(frontend.page_folder() is None, reason="comfyui-frontend-package is not installed")


class Watched:
    """A page, and what happened in it."""

    def __init__(self, page: Any, url: str) -> None:
        self.page, self.url = page, url
        self.errors = list[str]()
        self.messages = list[dict[str, Any]]()
        self.pictures = list[bytes]()
        self.outside = list[str]()
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda line: self.errors.append(line.text) if line.type == "error" else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("websocket", lambda socket: socket.on("framereceived", self._hear))
        page.on("requestfinished", self._note)

    def open(self) -> None:
        """Load the page, and wait until it can be used."""
        self.page.goto(f"{self.url}/comfy/", wait_until="domcontentloaded")
        self.page.wait_for_function("window.app?.graph && window.app.extensionManager && !window.app.loading")

    def unexpected(self) -> list[str]:
        """Errors that nobody should see."""
        return [error for error in self.errors if not any(each in error for each in HARMLESS)]

    def types(self) -> list[str]:
        """Which messages came through the websocket."""
        return [message["type"] for message in self.messages]

    def _hear(self, frame: str | bytes) -> None:
        if isinstance(frame, str):
            self.messages.append(json.loads(frame))
        else:
            self.pictures.append(frame)

    def _note(self, request: Any) -> None:
        if not request.url.startswith((self.url, "data:", "blob:")):
            self.outside.append(request.url)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip("there is no Chromium here")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=list(ARGUMENTS))
        yield browser
        browser.close()


@pytest.fixture
def watched(browser: Any, live_model: Live) -> Iterator[Watched]:
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    yield Watched(context.new_page(), live_model.url)
    context.close()


@installed
def test_the_page_draws_and_keeps_what_is_saved(watched: Watched, live_model: Live) -> None:
    page = watched.page
    watched.open()
    # A first visit begins with the choice of a template; one of them needs no download.
    page.get_by_text("All Templates").first.click()
    page.get_by_text("Embedded model").first.click()
    page.wait_for_function("app.graph.nodes.length === 7 && app.graph.nodes.some(n => n.title === 'What to draw')")

    before = colours(page.screenshot())
    page.get_by_role("button", name="Run", exact=False).first.click()
    page.wait_for_function("Object.values(app.nodeOutputs).some(output => output.images?.length)")
    assert watched.types().count("progress") == 20
    assert {"execution_start", "progress_state", "executing", "executed", "status"} <= set(watched.types())
    assert all(frame.startswith(b"\x00\x00\x00\x04") for frame in watched.pictures)
    assert watched.pictures, "previews on the way"
    page.wait_for_function("app.graph.nodes.find(n => n.type === 'SaveImage').imgs?.[0]?.complete")
    page.wait_for_timeout(500)
    red, blue = colours(page.screenshot())
    assert min(red - before[0], blue - before[1]) > 100, "a red circle and a blue square are in sight"

    page.keyboard.press("Control+s")
    page.get_by_role("dialog").get_by_role("textbox").fill("kept")
    with page.expect_response(lambda answer: "workflows%2Fkept.json" in answer.url and answer.ok):
        page.keyboard.press("Enter")
    saved = live_model.settings.user_dir / "default" / "workflows" / "kept.json"
    assert len(json.loads(saved.read_text())["nodes"]) == 7
    page.reload(wait_until="domcontentloaded")
    page.wait_for_function("window.app?.graph?.nodes?.length === 7")
    assert "kept" in page.title()
    assert watched.unexpected() == []
    assert watched.outside == []


@installed
def test_its_files_come_as_what_they_are(server: TestClient) -> None:
    page = server.get("/comfy/")
    assert page.headers["cache-control"] == "no-cache"
    assert "default-src 'self'" in page.headers["content-security-policy"]
    script = next(part for part in page.text.split('"') if part.startswith("./assets/index-"))
    answer = server.get(f"/comfy/{script.removeprefix('./')}")
    assert answer.headers["content-type"].startswith("text/javascript")
    assert "immutable" in answer.headers["cache-control"]
    assert server.get("/comfy", follow_redirects=False).headers["location"] == "/comfy/"
    for path in ("/comfy/..%2f..%2fsetup.py", "/comfy/%2e%2e/__init__.py", "/comfy/assets/..%2f..%2f__init__.py"):
        assert server.get(path).status_code == 404
    listed = server.get("/extensions").json()
    assert len(listed) > 10
    assert server.get(f"/comfy{listed[0]}").status_code == 200


def test_without_the_package_the_page_says_what_to_install(
    make_server: MakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frontend, "page_folder", lambda: None)
    answer = make_server().get("/comfy/")
    assert answer.status_code == 404
    assert "pip install 'octavo[comfyui]'" in answer.text


def test_each_template_is_a_workflow_with_a_picture(server: TestClient) -> None:
    [category] = server.get("/comfy/templates/index.json").json()
    models = {path.name for path in (ROOT / "examples" / "workflows").glob("*.json")}
    for template in category["templates"]:
        workflow = server.get(f"/comfy/templates/{template['name']}.json").json()
        names = [value for node in workflow["nodes"] for value in node.get("widgets_values") or ()]
        files = [name for name in names if str(name).endswith(".safetensors")]
        lists = FixedLists(checkpoints=files, text_encoders=files)
        prompt = to_prompt(workflow, NODES, lists)
        if template["name"] not in NEED_A_PICTURE:
            assert validate(prompt, NODES, lists).node_errors == {}, template["name"]
        if template["name"] != "octavo-demo":
            assert f"{template['name']}.json" in models, "the same as among the examples"
        picture = server.get(f"/comfy/templates/{template['name']}-1.{template['mediaSubtype']}")
        assert Image.open(BytesIO(picture.content)).size == (256, 256)
    assert server.get("/comfy/templates/..%2Findex.json").status_code == 404


def colours(screenshot: bytes) -> tuple[int, int]:
    """How many pixels are plainly red, how many plainly blue."""
    pixels = np.asarray(Image.open(BytesIO(screenshot)).convert("RGB"))
    r, g, b = pixels[..., 0], pixels[..., 1], pixels[..., 2]
    return int(((r > 180) & (g < 90) & (b < 90)).sum()), int(((r < 90) & (g < 130) & (b > 180)).sum())
