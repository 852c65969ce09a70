"""The page's routes, and the page itself in a browser."""

import io
import json
import re
import shutil
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from tests.server.conftest import Live, MakeServer, until

SETTINGS = {"prompt": "a red star", "seed": 7, "width": 64, "height": 96, "steps": 3}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)

# A preview may be gone before anyone can ask for it.
WATCH_FOR_PREVIEWS = """() => {
  window.previews = 0;
  const look = () => { window.previews += document.querySelectorAll("#frame img.unfinished").length };
  new MutationObserver(look).observe(document.getElementById("frame"), { childList: true });
}"""


def ended(server: TestClient, id: str) -> dict[str, Any]:
    found: dict[str, Any] = {}

    def over() -> bool:
        found.update(server.get(f"/octavo/jobs/{id}").json())
        return bool(found["over"])

    until(over, "the job ends")
    return found


def ask(server: TestClient, **more: Any) -> dict[str, Any]:
    answer = server.post("/octavo/jobs", json={**SETTINGS, **more})
    assert answer.status_code == 201, answer.text
    told: dict[str, Any] = answer.json()
    return told


def test_the_page_is_its_own_files_and_runs_no_other_script(server: TestClient) -> None:
    page = server.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "'unsafe-inline'" not in page.headers["content-security-policy"]
    assert "<style" not in page.text
    assert "script>" not in page.text.replace("></script>", "")
    for name, kind in (("page.js", "text/javascript"), ("page.css", "text/css"), ("icon.svg", "image/svg+xml")):
        answer = server.get(f"/page/{name}")
        assert answer.headers["content-type"].startswith(kind)
        assert f"page/{name}" in page.text
    for module in re.findall(r'from "\./(.+?)"', server.get("/page/page.js").text):
        assert server.get(f"/page/{module}").headers["content-type"].startswith("text/javascript")
    assert server.get("/page/api.py").status_code == 404


def test_models_come_with_the_settings_that_suit_them(server: TestClient) -> None:
    told = server.get("/octavo/models").json()
    by_name = {each["name"]: each for each in told["models"]}
    assert told["default"] == "octavo-demo.safetensors"
    assert set(by_name) == {"octavo-demo.safetensors", "octavo-demo-fp8.safetensors"}
    assert by_name["octavo-demo.safetensors"]["preset"]["width"] == 128
    assert "FP8" in by_name["octavo-demo-fp8.safetensors"]["title"]
    assert "euler" in told["samplers"]
    assert "simple" in told["schedules"]


def test_what_is_asked_is_drawn_listed_and_shown(server: TestClient) -> None:
    job = ended(server, ask(server, batch=2)["id"])
    assert job["state"] == "done"
    assert [each["settings"]["seed"] for each in job["pictures"]] == [7, 8]
    image = Image.open(io.BytesIO(server.get(f"/{job['pictures'][1]['url']}").content))
    assert image.size == (64, 96)
    listed = server.get("/octavo/jobs").json()
    assert listed["total"] == 1
    assert listed["jobs"][0]["settings"]["steps"] == 3


def test_jobs_come_in_pages_the_newest_first_and_can_be_forgotten(server: TestClient) -> None:
    ids = [ask(server, seed=seed)["id"] for seed in range(3)]
    for id in ids:
        ended(server, id)
    page = server.get("/octavo/jobs", params={"limit": 2, "offset": 1}).json()
    assert [each["id"] for each in page["jobs"]] == [ids[1], ids[0]]
    assert server.delete(f"/octavo/jobs/{ids[0]}").status_code == 200
    assert server.get(f"/octavo/jobs/{ids[0]}").status_code == 404


def test_a_running_job_is_cancelled(server: TestClient) -> None:
    id = ask(server, prompt="slow 500")["id"]
    until(lambda: server.get(f"/octavo/jobs/{id}").json()["state"] == "running", "the job runs")
    server.delete(f"/octavo/jobs/{id}")
    assert ended(server, id)["state"] == "cancelled"


def test_a_picture_that_was_sent_is_one_to_start_from(server: TestClient) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(buffer, "PNG")
    name = server.post("/octavo/pictures", content=buffer.getvalue()).json()["name"]
    told = ask(server, image=name, denoise=0.5)
    assert told["settings"]["image"] == name  # and not where it lies
    job = ended(server, told["id"])
    assert job["state"] == "done", job["error"]


def test_a_picture_that_was_sent_is_one_to_follow(server: TestClient) -> None:
    buffer = io.BytesIO()
    picture = Image.new("RGB", (64, 64), "white")
    picture.paste((0, 0, 0), (16, 16, 48, 48))
    picture.save(buffer, "PNG")
    name = server.post("/octavo/pictures", content=buffer.getvalue()).json()["name"]
    control = {"image": name, "type": "canny", "preprocess": "canny", "strength": 0.8}
    told = ask(server, controls=[control])
    assert told["settings"]["controls"] == [control]  # and not where it lies
    assert ended(server, told["id"])["state"] == "done"
    for wrong, word in (({"type": "depth"}, "no ControlNet for depth"), ({"model": "/etc/passwd"}, "no ControlNet")):
        refused = server.post("/octavo/jobs", json={**SETTINGS, "controls": [{"image": name, **wrong}]})
        assert (refused.status_code, word in refused.text) == (404, True), refused.text


def test_a_second_pass_is_drawn_and_its_settings_are_a_wish_again(live_model: Live) -> None:
    """What a picture tells of itself can be asked for as it is, as the page does to compare, and draws the same."""
    with httpx.Client(base_url=live_model.url, timeout=30) as server:

        def drawn(wish: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
            answer = server.post("/octavo/jobs", json=wish)
            assert answer.status_code == 201, answer.text
            job: dict[str, Any] = {}

            def over() -> bool:
                job.update(server.get(f"/octavo/jobs/{answer.json()['id']}").json())
                return bool(job["over"])

            until(over, "the job ends")
            assert job["state"] == "done", job["error"]
            image = Image.open(io.BytesIO(server.get(f"/{job['pictures'][0]['url']}").content))
            return job["pictures"][0]["settings"], image.convert("RGB").tobytes()

        told, pixels = drawn({**SETTINGS, "hires": {"scale": 1.5, "prompt": "a blue star", "steps": 2}})
        expected = {"width": 96, "height": 144, "method": "lanczos", "prompt": "a blue star", "steps": 2}
        assert {name: told["hires"][name] for name in expected} == expected
        again = {name: value for name, value in told.items() if name not in ("version", "model")}
        assert drawn(again) == (told, pixels)


def test_a_second_pass_is_held_to_what_the_server_draws(make_server: MakeServer) -> None:
    server = make_server(max_pixels=128 * 192)
    assert server.post("/octavo/jobs", json={**SETTINGS, "hires": {"scale": 2}}).status_code == 201
    answer = server.post("/octavo/jobs", json={**SETTINGS, "hires": {"width": 144}})
    assert (answer.status_code, "144x224" in answer.text) == (400, True), answer.text


def test_a_part_of_a_finished_picture_is_drawn_anew_and_the_rest_stays(live_model: Live) -> None:
    """Without feather only the region may change; the new picture tells what was done, and can be refined again."""
    with httpx.Client(base_url=live_model.url, timeout=30) as server:

        def finished(answer: httpx.Response) -> dict[str, Any]:
            assert answer.status_code == 201, answer.text
            found: dict[str, Any] = {}

            def over() -> bool:
                found.update(server.get(f"/octavo/jobs/{answer.json()['id']}").json())
                return bool(found["over"])

            until(over, "the job ends")
            assert found["state"] == "done", found["error"]
            return found

        def pixels(job: dict[str, Any]) -> Any:
            return np.array(Image.open(io.BytesIO(server.get(f"/{job['pictures'][0]['url']}").content)).convert("RGB"))

        first = finished(server.post("/octavo/jobs", json={**SETTINGS, "width": 128, "height": 128}))
        wish = {"prompt": "a blue square", "region": [64, 32, 48, 40], "feather": 0, "denoise": 0.9, "steps": 3}
        wish["picture"] = first["pictures"][0]["name"]
        second = finished(server.post("/octavo/refine", json=wish))
        (told,) = second["pictures"][0]["refined"]
        assert told["region"] == wish["region"]
        assert told["request"]["prompt"] == "a blue square"
        assert second["pictures"][0]["settings"]["prompt"] == SETTINGS["prompt"]
        differ = (pixels(first) != pixels(second)).any(axis=2)
        rows, columns = np.nonzero(differ)
        assert (columns.min(), columns.max() + 1, rows.min(), rows.max() + 1) == (64, 112, 32, 72)
        again = {**wish, "picture": second["pictures"][0]["name"], "region": [0, 0, 40, 40], "follow_edges": 0}
        third = finished(server.post("/octavo/refine", json=again))
        assert [each["region"] for each in third["pictures"][0]["refined"]] == [[64, 32, 48, 40], [0, 0, 40, 40]]

        # A picture from elsewhere says nothing of itself: the part's settings stand for it.
        buffer = io.BytesIO()
        Image.new("RGB", (96, 64), "white").save(buffer, "PNG")
        name = server.post("/octavo/pictures", content=buffer.getvalue()).json()["name"]
        foreign = finished(server.post("/octavo/refine", json={**wish, "picture": name, "region": [8, 8, 40, 40]}))
        assert foreign["pictures"][0]["settings"]["prompt"] == "a blue square"
        assert pixels(foreign).shape == (64, 96, 3)


@pytest.mark.parametrize(
    ("wish", "status", "word"),
    [
        ({"region": [40, 40, 40, 40]}, 400, "not inside"),
        ({"region": [0, 0, 4, 40]}, 400, "at least 8"),
        ({}, 400, "either a region"),
        ({"region": [0, 0, 32, 32], "mask": "absent.png"}, 400, "no picture"),
        ({"region": [0, 0, 32, 32], "picture": "absent.png"}, 400, "no picture"),
        ({"region": [0, 0, 32, 32], "picture": "../data/keys.json"}, 400, "no name of a file"),
        ({"region": [0, 0, 32, 32], "denoise": 2}, 422, "denoise"),
        ({"region": [0, 0, 32, 32], "batch": 2}, 422, "batch"),
        ({"region": [0, 0, 32, 32], "prompt": " "}, 400, "prompt is empty"),
        ({"region": [0, 0, 32, 32], "follow_edges": 0.5}, 400, "no edges"),
    ],
)
def test_parts_that_cannot_be_refined_are_refused_at_once(
    server: TestClient, wish: dict[str, Any], status: int, word: str
) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(buffer, "PNG")
    name = server.post("/octavo/pictures", content=buffer.getvalue()).json()["name"]
    answer = server.post("/octavo/refine", json={"picture": name, "prompt": "a red star", **wish})
    assert answer.status_code == status, answer.text
    assert word in answer.text
    assert server.get("/octavo/jobs").json()["total"] == 0


@pytest.mark.parametrize(
    ("wish", "status", "word"),
    [
        ({"prompt": " "}, 400, "prompt is empty"),
        ({"width": 100}, 400, "multiple of 16"),
        ({"width": 512}, 400, "too large"),
        ({"sampler": "eular"}, 400, "euler"),
        ({"model": "octavo-dmeo"}, 404, "no model"),
        ({"model": "/etc/passwd"}, 404, "no model"),
        ({"image": "../keys.json"}, 400, "no name of a file"),
        ({"image": "absent.png"}, 400, "no picture"),
        ({"controls": [{"image": "../keys.json", "type": "canny"}]}, 400, "no name of a file"),
        ({"controls": [{"image": "absent.png", "type": "canny"}]}, 400, "no picture"),
        ({"controls": [{"image": "a.png", "type": "canny", "strength": 11}]}, 422, "strength"),
        ({"outpaint": [16, 0, 0, 0]}, 400, "none is given"),
        ({"hires": {"scale": 4}}, 400, "too large"),
        ({"hires": {"scale": 0.5}}, 422, "scale"),
        ({"hires": {"width": 32}}, 400, "smaller"),
        ({"hires": {"method": "ESRGAN_4x"}}, 400, "upscaling models"),
        ({"hires": {"sampler": "eular"}}, 400, "euler"),
        ({"hires": {"prompt": "a <lora:absent>"}}, 404, "absent"),
        ({"hires": {"sclae": 2}}, 422, "sclae"),
        ({"batch": 65}, 422, "batch"),
        ({"sede": 1}, 422, "sede"),
    ],
)
def test_wishes_that_cannot_be_met_are_refused_at_once(
    server: TestClient, wish: dict[str, Any], status: int, word: str
) -> None:
    answer = server.post("/octavo/jobs", json={**SETTINGS, **wish})
    assert answer.status_code == status, answer.text
    assert word in answer.text
    assert server.get("/octavo/jobs").json()["total"] == 0


@pytest.mark.parametrize("name", ["../data/queue.sqlite3", "%2e%2e/data/keys.json", "absent.png", "notes.txt"])
def test_only_pictures_of_the_output_folder_are_shown(server: TestClient, name: str) -> None:
    assert server.get(f"/octavo/pictures/{name}").status_code in (400, 404)


def test_what_is_no_picture_is_not_taken(server: TestClient) -> None:
    assert server.post("/octavo/pictures", content=b"GIF89a").status_code == 400


def test_the_same_wish_sent_twice_under_one_key_is_drawn_once(server: TestClient) -> None:
    wish = {key: value for key, value in SETTINGS.items() if key != "seed"}
    first, second = (
        server.post("/octavo/jobs", json=wish, headers={"Idempotency-Key": "mine"}).json()["id"] for _ in range(2)
    )
    assert first == second


def test_callers_see_their_own_jobs_only(make_server: MakeServer) -> None:
    one, other = {"X-API-Key": "one-" * 5}, {"X-API-Key": "other-" * 5}
    server = make_server(api_keys=(one["X-API-Key"], other["X-API-Key"]))
    assert server.get("/").status_code == 401
    id = server.post("/octavo/jobs", json=SETTINGS, headers=one).json()["id"]
    assert server.get(f"/octavo/jobs/{id}", headers=one).status_code == 200
    assert server.get(f"/octavo/jobs/{id}", headers=other).status_code == 404
    assert server.get("/octavo/jobs", headers=other).json()["jobs"] == []


def test_events_tell_of_state_progress_previews_and_the_end(live: Live) -> None:
    told: list[tuple[str, dict[str, Any]]] = []
    listening = threading.Event()

    def listen() -> None:
        with httpx.stream("GET", f"{live.url}/octavo/events", timeout=20) as answer:
            type = ""
            for line in answer.iter_lines():
                listening.set()
                if line.startswith("event: "):
                    type = line[7:]
                elif line.startswith("data: "):
                    told.append((type, json.loads(line[6:])))
                    if type == "job" and told[-1][1]["over"]:
                        return

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    assert listening.wait(10)
    httpx.post(f"{live.url}/octavo/jobs", json={**SETTINGS, "prompt": "slow 5"})
    thread.join(20)
    assert not thread.is_alive()
    types = [type for type, _ in told]
    assert types[0] == "state"
    assert {"job", "progress", "preview"} <= set(types)
    assert told[-1][1]["pictures"]
    assert [data["value"] for type, data in told if type == "progress" and "value" in data] == [1, 2, 3, 4, 5]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("there is no Chromium")
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield browser
        browser.close()


def _is_refused(answer: Any) -> bool:
    """Pictures of the gallery aside: others of this server's tests may have taken theirs away."""
    return answer.status >= 400 and "/octavo/pictures/" not in answer.url


def _is_complaint(message: Any) -> bool:
    return message.type == "error" and not message.text.startswith("Failed to load resource")


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_a_picture_is_drawn_used_again_and_compared_in_a_browser(
    browser: Any, live_model: Live, width: int, scheme: str
) -> None:
    page = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
    troubles: list[str] = []
    page.on("response", lambda answer: troubles.append(answer.url) if _is_refused(answer) else None)
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("console", lambda message: troubles.append(message.text) if _is_complaint(message) else None)
    page.goto(live_model.url)
    page.wait_for_selector("select[name=model] option", state="attached")
    assert page.evaluate("document.documentElement.scrollWidth") <= width

    # Draw, with a preview on the way
    prompt = f"a large pink ring on a {'gray' if scheme == 'light' else 'black'} background"  # nobody else's
    page.fill("[name=prompt]", prompt)
    page.fill("[name=seed]", "5")
    page.fill("[name=steps]", "60")
    for side in ("width", "height"):
        page.fill(f"[name={side}]", "256")
    page.evaluate(WATCH_FOR_PREVIEWS)
    page.click("button.main")
    page.wait_for_selector(f"#frame img[alt='{prompt}']")
    assert page.evaluate("window.previews") > 0
    assert "60 steps" in page.inner_text("#about")
    assert "seed 5" in page.inner_text("#about")
    assert page.eval_on_selector("#frame img", "(image) => image.decode().then(() => image.naturalWidth)") == 256

    # Use these
    page.fill("[name=prompt]", "something else")
    page.fill("[name=steps]", "10")
    page.click("text=Use these")
    assert page.input_value("[name=prompt]") == prompt
    assert page.input_value("[name=steps]") == "60"
    assert page.input_value("[name=seed]") == "5"

    # The other model under the slider
    page.click("text=Compare with octavo-demo-fp8")
    page.wait_for_selector("#frame .compare input")
    labels = page.locator("#frame .compare b").all_inner_texts()
    assert labels == ["octavo-demo", "octavo-demo-fp8 · FP8"]
    page.fill("#frame .compare input", "80")
    assert page.eval_on_selector(".compare", "(box) => box.style.getPropertyValue('--at')") == "80%"

    # Cancel
    page.fill("[name=prompt]", "a blue circle on a white background")
    page.eval_on_selector("[name=steps]", "(field) => { field.max = 1000; field.value = 1000 }")
    page.click("button.main")
    page.click("#queue button:has-text('Cancel')")
    page.wait_for_selector("#queue li", state="detached")

    # What was drawn is there when the page is opened again
    page.reload()
    page.wait_for_selector("#gallery button")
    assert page.locator(f"#gallery button[title='{prompt}']").count() == 2
    assert troubles == []
    page.close()


@pytest.mark.parametrize(("width", "scheme"), [(1280, "dark"), (390, "light")])
def test_a_larger_pass_is_asked_for_and_used_again_in_a_browser(
    browser: Any, live_model: Live, width: int, scheme: str
) -> None:
    page = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
    troubles: list[str] = []
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.goto(live_model.url)
    page.wait_for_selector("select[name=hires_method] option", state="attached")
    prompt = f"a large orange ring on a {'gray' if scheme == 'light' else 'black'} background"
    page.fill("#form [name=prompt]", prompt)
    page.fill("[name=steps]", "3")
    page.fill("[name=seed]", "6")
    page.click("text=Larger, in a second pass")
    assert page.inner_text("#hires-size") == "Once, as large as above"
    page.fill("[name=hires_scale]", "1.5")
    page.select_option("[name=hires_method]", "latent-bislerp")
    page.fill("[name=hires_denoise]", "0.3")
    page.fill("[name=hires_steps]", "5")
    page.fill("[name=hires_prompt]", "a large ring")
    unseen = "; this small model has only seen 128 × 128"
    assert page.inner_text("#hires-size") == f"128 × 128, then 192 × 192{unseen}"
    page.fill("[name=width]", "96")
    assert page.inner_text("#hires-size") == f"96 × 128, then 144 × 192{unseen}"
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.click("#form button.main")
    page.wait_for_selector(f"#frame img[alt='{prompt}']")
    assert page.eval_on_selector("#frame img", "(image) => image.decode().then(() => image.naturalWidth)") == 144
    assert "96×128, then 144×192 (latent-bislerp, 0.3)" in page.inner_text("#about")
    assert "second pass: a large ring" in page.inner_text("#about")

    # Used again, all of it stands in the form; without the factor the picture is drawn once
    names = ("scale", "method", "denoise", "steps", "prompt")
    asked = [page.input_value(f"[name=hires_{name}]") for name in names]
    for name in ("scale", "prompt"):
        page.fill(f"[name=hires_{name}]", "")
    page.fill("[name=hires_denoise]", "0.9")
    page.click("text=Use these")
    assert [page.input_value(f"[name=hires_{name}]") for name in names] == asked
    page.fill("[name=hires_scale]", "")
    page.fill("[name=seed]", "8")
    page.click("#form button.main")
    page.wait_for_selector("#about :text('seed 8')")
    assert "then" not in page.inner_text("#about")
    assert troubles == []
    page.close()


@pytest.mark.parametrize(("width", "scheme"), [(1280, "dark"), (390, "light")])
def test_a_part_is_marked_by_dragging_and_refined_in_a_browser(
    browser: Any, live_model: Live, width: int, scheme: str
) -> None:
    page = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
    troubles: list[str] = []
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.goto(live_model.url)
    page.wait_for_selector("select[name=model] option", state="attached")
    prompt = f"a small yellow star on a {'blue' if scheme == 'light' else 'green'} background"
    page.fill("#form [name=prompt]", prompt)
    page.fill("[name=steps]", "4")
    page.click("#form button.main")
    page.wait_for_selector(f"#frame img[alt='{prompt}']")

    # The boxes stay the same elements whatever happens to other jobs, so that they can be pressed and marked
    boxes, other = "#about button, #gallery button, #frame img", f"a {'red' if scheme == 'light' else 'pink'} heart"
    page.eval_on_selector_all(boxes, "(boxes) => { for (const box of boxes) box.kept = true }")
    httpx.post(f"{live_model.url}/octavo/jobs", json={"prompt": other, "steps": 2})
    page.wait_for_selector(f"#gallery button[title='{other}']")
    fresh = page.eval_on_selector_all(boxes, "(boxes) => boxes.filter((box) => !box.kept).map((box) => box.title)")
    assert fresh == [other]

    page.click("text=Refine a part")
    page.wait_for_selector("#refine:not([hidden])")
    assert page.input_value("#refine [name=prompt]") == prompt
    page.locator("#frame").scroll_into_view_if_needed()
    box = page.eval_on_selector(
        "#frame img", "(i) => { const b = i.getBoundingClientRect(); return [b.x, b.y, b.width] }"
    )
    left, top, side = box
    page.mouse.move(left + side / 4, top + side / 4)
    page.mouse.down()
    page.mouse.move(left + side / 2, top + side * 3 / 4, steps=4)
    page.mouse.up()
    region = [int(page.input_value(f"#refine [name={name}]")) for name in ("x", "y", "width", "height")]
    assert all(abs(found - wanted) <= 1 for found, wanted in zip(region, (32, 32, 32, 64), strict=True)), region
    seen = page.locator(".marked").bounding_box()
    assert abs(seen["x"] - (left + side / 4)) < 6
    assert abs(seen["width"] - side / 4) < 6
    assert page.evaluate("document.documentElement.scrollWidth") <= width

    page.fill("#refine [name=width]", "4000")
    page.fill("#refine [name=prompt]", "a large red star")
    page.click("#refine button.main")
    page.wait_for_selector("#refine-trouble:not([hidden])")
    assert "not inside" in page.inner_text("#refine-trouble")
    page.fill("#refine [name=width]", str(region[2]))
    page.click("#refine button.main")
    page.wait_for_selector("#about :text('refined at')")
    assert "a large red star" in page.inner_text("#about")
    assert page.locator("#refine").is_hidden()
    assert troubles == []
    page.close()
