"""`octavo generate --hires` as a user meets it."""

from pathlib import Path

import pytest

from octavo.pipeline.hires import METHODS, Hires
from octavo.pipeline.image import open_image, read_settings
from tests.cli.test_generate import Run, run, tree

__all__ = ["run", "tree"]  # fixtures


def pixels(path: str) -> bytes:
    return open_image(path).convert("RGB").tobytes()


@pytest.mark.parametrize(
    ("words", "size"),
    [
        (("--hires", "2"), (64, 64)),
        (("--hires", "1.5"), (48, 48)),
        (("--hires", "64x48"), (64, 48)),
        (("--hires", " 64 × 48 "), (64, 48)),
    ],
)
def test_a_picture_is_drawn_again_at_a_larger_size(run: Run, words: tuple[str, ...], size: tuple[int, int]) -> None:
    code, out, _ = run("a red star", *words, "--out", "x.png")
    assert (code, out) == (0, ["x.png"])
    assert open_image("x.png").size == size
    settings = read_settings("x.png")
    assert (settings["width"], settings["height"]) == (32, 32)
    assert (settings["hires"]["width"], settings["hires"]["height"]) == size


def test_each_option_says_how_the_second_pass_is_drawn(run: Run) -> None:
    given = {
        "method": "latent-bislerp", "denoise": "0.7", "steps": "3", "guidance": "2.5", "sampler": "heun",
        "schedule": "karras", "prompt": "a blue star", "negative": "red",
    }  # fmt: skip
    words = [word for name, value in given.items() for word in (f"--hires-{name}", value)]
    assert run("a red star", "--hires", "2", *words, "--out", "x.png")[0] == 0
    assert read_settings("x.png")["hires"] == {
        "width": 64, "height": 64, "method": "latent-bislerp", "denoise": 0.7, "steps": 3, "guidance_scale": 2.5,
        "sampler": "heun", "schedule": "karras", "prompt": "a blue star", "negative_prompt": "red",
    }  # fmt: skip


def test_it_is_repeated_changed_and_left_out_from_a_picture(run: Run) -> None:
    run("a red star", "--seed", "7", "--hires", "2", "--hires-denoise", "0.4", "--out", "first.png")
    for words, hires in [
        ((), {"denoise": 0.4, "width": 64}),
        (("--hires-denoise", "0.7"), {"denoise": 0.7, "width": 64}),
        (("--hires", "1.5"), {"denoise": 0.4, "width": 48}),
    ]:
        assert run("--from", "first.png", *words, "--out", "again.png")[0] == 0
        found = read_settings("again.png")["hires"]
        assert {name: found[name] for name in hires} == hires
        assert (pixels("again.png") == pixels("first.png")) == (not words)
    run("--from", "first.png", "--hires", "no", "--out", "small.png")
    assert open_image("small.png").size == (32, 32)
    assert "hires" not in read_settings("small.png")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--hires", "large"), "write a factor"),
        (("--hires", "64x"), "write a factor"),
        (("--hires", "0.5"), "from 1 to 8"),
        (("--hires", "nan"), "from 1 to 8"),
        (("--hires", "100x100"), "use 96"),
        (("--hires", "16x16"), "smaller than those of 32x32"),
        (("--hires", "8"), "too large"),
        (("--hires-steps", "4", "--hires-negative", "x"), "--hires-steps, --hires-negative: these say how"),
        (("--hires", "no", "--hires-steps", "4"), "contradict"),
        (("--hires", "2", "--hires-method", "esrgan"), "upscaling models are not read"),
        (("--hires", "2", "--hires-sampler", "eular"), "Did you mean 'euler'"),
        (("--hires", "2", "--image", "x.png"), "second pass alone"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_sentence(run: Run, words: tuple[str, ...], message: str) -> None:
    code, out, err = run("a red star", *words)
    assert (code, out) == (2, [])
    assert message in " ".join(err.split())
    assert "Traceback" not in err
    assert not Path("output").exists()


def test_words_of_the_second_prompt_that_nobody_knows_are_remarked(run: Run) -> None:
    _, _, err = run("a red star", "--hires", "2", "--hires-prompt", "a zorgle star")
    assert "'zorgle'" in err


def test_the_help_tells_the_defaults_that_hold(run: Run) -> None:
    code, out, _ = run("--help")
    told = " ".join(" ".join(out).replace("│", " ").split())
    assert code == 0
    assert f"{Hires().method} (if unsaid)" in told
    assert f"{Hires().denoise:g} if unsaid" in told
    named = ("bicubic", "bilinear", "nearest-exact", "latent-bislerp", "latent-bicubic")
    assert all(name in told and name in METHODS for name in named)
