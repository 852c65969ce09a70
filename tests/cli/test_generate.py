"""`octavo generate` as a user meets it: paths on stdout, words on stderr, exit codes."""

import io
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from octavo.cli import main as cli
from octavo.pipeline.image import open_image, read_settings
from tests.tiny_tree import write_tiny_tree

Run = Callable[..., tuple[int, list[str], str]]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_tree(tmp_path_factory.mktemp("tiny") / "models")


@pytest.fixture
def run(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command in an empty folder: (exit code, lines of stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OCTAVO_MODELS", str(tree))
    monkeypatch.setenv("OCTAVO_MODEL", "tiny")
    monkeypatch.setenv("COLUMNS", "300")

    def run(*words: str) -> tuple[int, list[str], str]:
        monkeypatch.setattr(sys, "argv", ["octavo", "generate", "--steps", "2", "--size", "32", *words])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        out, err = capsys.readouterr()
        code = exit_.value.code
        return (code if isinstance(code, int) else 0), out.splitlines(), err

    return run


def test_a_prompt_gives_the_path_of_a_picture_and_nothing_else_on_stdout(run: Run) -> None:
    code, out, err = run("a red star")
    assert (code, out) == (0, ["output/octavo-00001.png"])
    with Image.open(out[0]) as image:
        assert image.size == (32, 32)
    assert "tiny" in err


def test_pictures_are_numbered_on_and_never_overwritten(run: Run) -> None:
    assert run("a red star", "--batch", "2")[1] == ["output/octavo-00001.png", "output/octavo-00002.png"]
    assert run("a red star", "--quiet")[1:] == (["output/octavo-00003.png"], "")


def test_a_picture_is_repeated_from_its_file_with_changes_on_top(run: Run, tmp_path: Path) -> None:
    run("a red star", "--seed", "7", "--guidance", "2.5", "--out", "first.png")
    run("--from", "first.png", "--out", "again.png")
    run("--from", "first.png", "--seed", "8", "--out", "other.webp")
    first, again, other = (
        open_image(tmp_path / name).convert("RGB") for name in ("first.png", "again.png", "other.webp")
    )
    assert first.tobytes() == again.tobytes() != other.tobytes()
    assert read_settings("other.webp") == {**read_settings("first.png"), "seed": 8}


def test_prompts_come_from_a_file_and_from_standard_input(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("prompts.txt").write_text("a red star\n\na blue circle\n", "utf-8")
    _, out, _ = run("--prompts", "prompts.txt", "--out", "set")
    assert [read_settings(path)["prompt"] for path in out] == ["a red star", "a blue circle"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a white star\n")))
    _, out, _ = run("-", "--out", "set")
    assert [read_settings(path)["prompt"] for path in out] == ["a white star"]


def test_unknown_words_are_named(run: Run) -> None:
    assert "'dragon'" in run("a red dragon")[2]


def test_preview_is_kept_beside_the_output(run: Run) -> None:
    run("a red star", "--preview", "--out", "set")
    assert sorted(path.name for path in Path("set").iterdir()) == ["octavo-00001.png", "preview.png"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "Say what to draw"),
        (["  "], "prompt is empty"),
        (["x", "--size", "big"], "such as 1024x768"),
        (["x", "--size", "33x32"], "use 32"),
        (["x", "--size", "4096x4096"], "too large"),
        (["x", "--sampler", "eular"], "Did you mean 'euler'"),
        (["x", "--model", "tinny"], "Did you mean 'tiny'"),
        (["x", "--device", "gpu"], "gpu"),
        (["x", "--dtype", "float8"], "float8"),
        (["x", "--guidance-interval", "all"], "0.1-0.8"),
        (["x", "--image", "nowhere.png"], "no file"),
        (["x", "--denoise", "0.5"], "pass --image"),
        (["x", "--mask", "mask.png"], "pass --image"),
        (["x", "--from", "nowhere.png"], "no file"),
        (["x", "--prompts", "nowhere.txt"], "Cannot read"),
        (["x", "--batch", "2", "--out", "one.png"], "give a folder"),
        (["x", "--out", "x.gif"], "picture format"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line_with_exit_code_2(run: Run, words: list[str], message: str) -> None:
    code, out, err = run(*words)
    assert (code, out) == (2, [])
    assert message in err
    assert "Traceback" not in err
    assert not list(Path().glob("**/*.png"))


def test_what_the_mask_marks_is_drawn_anew_from_nothing_unless_told(run: Run) -> None:
    Image.new("RGB", (32, 32), "red").save("start.png")
    half = Image.new("L", (64, 64), 0)
    half.paste(255, (0, 0, 32, 64))
    half.save("half.png")
    run("a blue circle", "--image", "start.png", "--denoise", "0", "--out", "kept.png")
    run("a blue circle", "--image", "start.png", "--mask", "half.png", "--out", "drawn.png")
    settings = read_settings("drawn.png")
    assert (settings["mask"], settings["denoise"]) == ("half.png", 1.0)
    kept, drawn = (open_image(Path(name)).convert("RGB") for name in ("kept.png", "drawn.png"))
    assert kept.crop((0, 0, 16, 32)).tobytes() != drawn.crop((0, 0, 16, 32)).tobytes()
    run("--from", "drawn.png", "--out", "again.png")
    assert open_image(Path("again.png")).tobytes() == drawn.tobytes()


def test_a_mask_that_is_no_picture_is_refused(run: Run) -> None:
    Image.new("RGB", (32, 32), "red").save("start.png")
    Path("mask.png").write_text("white", "utf-8")
    code, out, err = run("x", "--image", "start.png", "--mask", "mask.png")
    assert (code, out) == (2, [])
    assert "mask.png cannot be read as a picture" in err
    code, _, err = run("x", "--image", "start.png", "--mask", "nowhere.png")
    assert code == 2
    assert "no file" in err


def test_control_c_keeps_finished_pictures(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from octavo.pipeline import generate

    draw = generate.draw

    def interrupted(*arguments: object) -> object:
        if arguments[4] == 1:  # the second picture
            raise KeyboardInterrupt
        return draw(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(generate, "draw", interrupted)
    code, out, err = run("a red star", "--batch", "5")
    assert (code, out) == (130, ["output/octavo-00001.png"])
    assert Path(out[0]).exists()
    assert "Traceback" not in err
