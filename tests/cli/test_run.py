"""`octavo run` as a user meets it: workflows in, paths of pictures on stdout, words on stderr, exit codes."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import octavo
from octavo.cli import main as cli
from octavo.pipeline.image import open_image
from tests.goldens import ROOT
from tests.graph.compare import FixedLists
from tests.lora_files import MMDIT_LAYERS, low_rank, write_lora

EXAMPLES = sorted((ROOT / "examples" / "workflows").glob("*.json"))
MODEL = "Model.ckpt_name=octavo-demo.safetensors"
SMALL = ("--set", "Size.width=64", "--set", "Size.height=64")
# What each example needs beside another model to be drawn small by the embedded one.
CHANGES = {
    "sd3.5-large-fp8": ("--set", "Sampler.steps=2", *SMALL),
    "sd3.5-large-fp8-page": ("--set", "Sampler.steps=2", *SMALL),
    "sd3.5-large-turbo": ("--set", "Text encoders.clip_name3=t5xxl.safetensors", *SMALL),
    "sd3.5-medium-slg": ("--set", "Sampler.steps=2", "--set", "11.layers=1", *SMALL),
    "img2img": ("--set", "Sampler.steps=3", "--set", "13.megapixels=0.01", "--set", "Picture.image=hole.png"),
    "inpaint": ("--set", "Sampler.steps=3", "--set", "Picture.image=hole.png"),
    "outpaint": ("--set", "Sampler.steps=3", "--set", "Picture.image=hole.png", "--set", "Room.right=32"),
    "controlnet-canny": (
        *("--set", "ControlNet.control_net_name=octavo-demo-canny.safetensors", "--set", "Picture.image=hole.png"),
        *("--set", "Sampler.steps=2", "--set", "Fit.width=64", "--set", "Fit.height=64", *SMALL),
    ),
    "lora": ("--set", "Sampler.steps=2", *SMALL),
    "hires": ("--set", "First pass.steps=2", "--set", "Second pass.steps=2", *SMALL),
}

Run = Callable[..., tuple[int, list[str], str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command in an empty folder: (exit code, lines of stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "1000")
    monkeypatch.delenv("OCTAVO_MODELS", raising=False)

    def run(*words: str | Path) -> tuple[int, list[str], str]:
        monkeypatch.setattr(sys, "argv", ["octavo", "run", *map(str, words)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        out, err = capsys.readouterr()
        code = exit_.value.code
        return (code if isinstance(code, int) else 0), out.splitlines(), err

    return run


def _picture_with_a_hole(folder: Path) -> None:
    folder.mkdir()
    picture = Image.new("RGBA", (64, 64), (30, 60, 200, 255))
    picture.paste((0, 0, 0, 0), (24, 24, 48, 48))
    picture.save(folder / "hole.png")


def _write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content), "utf-8")
    return path


PICTURE = {
    "1": {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 255}},
    "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "plain"}},
}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_draws_with_the_embedded_model(run: Run, tmp_path: Path, example: Path) -> None:
    _picture_with_a_hole(tmp_path / "input")
    if example.stem == "lora":
        mmdit = octavo.load(device="cpu").mmdit.skeleton
        for seed, name in enumerate(("style", "hands")):
            changes = low_rank(mmdit, MMDIT_LAYERS, size=0.1, seed=seed)
            write_lora(tmp_path / "models" / "loras" / f"{name}.safetensors", mmdit=changes)

    code, out, err = run(example, "--set", MODEL, *CHANGES[example.stem])

    assert code == 0, err
    (path,) = out
    prefix = example.stem.removesuffix("-page").removesuffix("-canny")
    assert path == f"output/{prefix}_00001_.png"
    expected = {"hires": (96, 96), "img2img": (96, 96), "outpaint": (96, 64)}.get(example.stem, (64, 64))
    assert open_image(path).size == expected


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_is_sound_where_its_files_are(example: Path) -> None:
    from octavo.graph.files import read_workflow
    from octavo.graph.nodes import NODES
    from octavo.graph.workflow import validate

    files = {
        "checkpoints": ["sd3.5_large_fp8_scaled", "sd3.5_large_turbo", "sd3.5_medium_incl_clips_t5xxlfp8scaled"],
        "controlnet": ["sd3.5_large_controlnet_canny"],
        "loras": ["style", "hands"],
        "text_encoders": ["clip_g", "clip_l", "t5xxl_fp8_e4m3fn_scaled"],
    }
    lists = FixedLists(
        example.parent, **{category: [f"{name}.safetensors" for name in names] for category, names in files.items()}
    )
    found = read_workflow(example, NODES, lists)
    loaded = [id for id, each in found.prompt.items() if each["class_type"] == "LoadImage"]
    for id in loaded:  # the user's own picture
        found.prompt[id] = {"class_type": "EmptyImage", "inputs": PICTURE["1"]["inputs"]}
        masks = [each["inputs"] for each in found.prompt.values() if each["inputs"].get("mask") == [id, 1]]
        for inputs in masks:
            found.prompt["mask"] = {"class_type": "SolidMask", "inputs": {"value": 1.0, "width": 8, "height": 8}}
            inputs["mask"] = ["mask", 0]

    assert validate(found.prompt, NODES, lists).node_errors == {}


def test_the_page_and_the_prompt_of_the_example_are_the_same(run: Run) -> None:
    folder = ROOT / "examples" / "workflows"
    code, out, _ = run(folder / "sd3.5-large-fp8-page.json", "--convert", "-")

    assert code == 0
    assert json.loads("\n".join(out)) == json.loads((folder / "sd3.5-large-fp8.json").read_text())


def test_a_saved_picture_is_a_workflow_and_values_change_on_top(run: Run, tmp_path: Path) -> None:
    run(_write(tmp_path / "w.json", PICTURE))

    code, out, _ = run("output/plain_00001_.png", "--set", "1.color=16711680", "--set", "2.filename_prefix=red")

    assert (code, out) == (0, ["output/red_00001_.png"])
    assert open_image("output/plain_00001_.png").getpixel((0, 0)) == (0, 0, 255)
    assert open_image(out[0]).getpixel((0, 0)) == (255, 0, 0)


def test_a_page_s_workflow_is_kept_in_the_picture(run: Run, tmp_path: Path) -> None:
    page = {
        "nodes": [
            {"id": 1, "type": "EmptyImage", "widgets_values": [8, 8, 1, 255]},
            {"id": 2, "type": "SaveImage", "inputs": [{"name": "images", "link": 3}], "widgets_values": ["plain"]},
        ],
        "links": [[3, 1, 0, 2, 0, "IMAGE"]],
    }
    _, (path,), _ = run(_write(tmp_path / "page.json", page))

    with Image.open(path) as picture:
        assert json.loads(picture.info["workflow"]) == page
        assert json.loads(picture.info["prompt"])["2"]["inputs"] == {"images": ["1", 0], "filename_prefix": "plain"}


def test_only_the_targets_are_run(run: Run, tmp_path: Path) -> None:
    other = {"3": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "other"}}}
    path = _write(tmp_path / "w.json", {**PICTURE, **other})

    assert run(path, "--target", "3")[1] == ["output/other_00001_.png"]


def test_seeds_change_pictures(run: Run) -> None:
    example = ROOT / "examples" / "workflows" / "sd3.5-large-fp8.json"
    words = (example, "--set", MODEL, *CHANGES[example.stem], "--seed")

    paths = [run(*words, seed)[1][0] for seed in ("7", "8", "7")]

    first, other, again = (open_image(path).tobytes() for path in paths)
    assert first == again
    assert first != other


def test_text_outputs_are_told_and_no_path(run: Run, tmp_path: Path) -> None:
    prompt = {
        "1": {"class_type": "PrimitiveString", "inputs": {"value": "hello [bold]you[/]"}},
        "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}},
    }

    code, out, err = run(_write(tmp_path / "w.json", prompt))

    assert (code, out) == (0, [])
    assert "hello [bold]you[/]" in err


def test_check_tells_and_runs_nothing(run: Run, tmp_path: Path) -> None:
    code, out, err = run(_write(tmp_path / "w.json", PICTURE), "--check")

    assert (code, out) == (0, [])
    assert "can be run: 2 nodes for 1 outputs" in err
    assert not (tmp_path / "output").exists()


def test_an_output_that_will_not_do_is_left_out_aloud(run: Run, tmp_path: Path) -> None:
    bad = {"3": {"class_type": "SaveImage", "inputs": {"images": ["1", 5], "filename_prefix": "other"}}}

    code, out, err = run(_write(tmp_path / "w.json", {**PICTURE, **bad}))

    assert (code, out) == (0, ["output/plain_00001_.png"])
    assert "Node 3 will not do" in err
    assert "EmptyImage has no output 5" in err


def test_a_model_that_is_not_there_is_named_with_what_to_do(run: Run) -> None:
    code, out, err = run(ROOT / "examples" / "workflows" / "sd3.5-large-fp8.json")

    assert (code, out) == (2, [])
    assert "'sd3.5_large_fp8_scaled.safetensors' not in" in err
    assert "--set 4.ckpt_name=octavo-demo.safetensors" in err
    assert "Traceback" not in err


def test_a_piece_of_a_workflow_is_answered_with_the_whole(run: Run, tmp_path: Path) -> None:
    """As it circulates: objects in a row, without ids, links or an end. What the error shows can be saved and run."""
    pieces = [
        {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "octavo-demo.safetensors"}},
        {"class_type": "CLIPTextEncode", "inputs": {"text": "a red star"}},
        {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        {"class_type": "KSampler", "inputs": {"steps": 2, "cfg": 4.5, "sampler_name": "euler", "scheduler": "normal"}},
    ]
    (tmp_path / "piece.json").write_text(",\n".join(json.dumps(each, indent=2) for each in pieces))
    code, out, err = run("piece.json")
    assert (code, out) == (2, [])
    assert "piece of a workflow" in err

    shown = err[err.index("{\n") : err.rindex("}") + 1]
    assert run("piece.json", "--convert", "workflow.json")[:2] == (0, ["workflow.json"])
    assert json.loads(shown) == json.loads((tmp_path / "workflow.json").read_text())
    assert run("workflow.json")[:2] == (0, ["output/ComfyUI_00001_.png"])


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ((), "Name a workflow"),
        (("nothing.json",), "There is no file nothing.json"),
        (("w.json", "--set", "1.colour=3"), "EmptyImage has no input 'colour'. Did you mean 'color'?"),
        (("w.json", "--set", "1.width=0"), "Value 0 smaller than min of 1"),
        (("w.json", "--seed", "3"), "no node of the workflow has a seed"),
        (("w.json", "--target", "1"), "there are: 2"),
        (("nodes.json",), "Add a node that keeps a result, such as SaveImage"),
        (("number.json", "--convert", "-"), "this is '5'"),
        (("w.json", "--convert", "nowhere/out.json"), "Cannot write nowhere/out.json"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_message(run: Run, tmp_path: Path, words: Any, reason: str) -> None:
    _write(tmp_path / "w.json", PICTURE)
    _write(tmp_path / "nodes.json", {"5": {"class_type": "CLIPLoader"}})
    _write(tmp_path / "number.json", 5)

    code, out, err = run(*words)

    assert (code, out) == (2, [])
    assert reason in err
    assert "Traceback" not in err


def test_a_node_that_fails_is_named(run: Run, tmp_path: Path) -> None:
    prompt = {
        "1": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "octavo-demo.safetensors"}},
        "8": {
            "class_type": "VAEDecode",
            "inputs": {"samples": ["1", 0], "vae": ["4", 2]},
            "_meta": {"title": "Decode"},
        },
        "9": {"class_type": "SaveImage", "inputs": {"images": ["8", 0], "filename_prefix": "x"}},
    }

    code, out, err = run(_write(tmp_path / "w.json", prompt))

    assert (code, out) == (2, [])
    assert "Node 8 (Decode): " in err
    assert "Traceback" not in err


def test_all_nodes_are_listed_with_what_they_take_and_give(run: Run) -> None:
    code, out, _ = run("--list-nodes")

    assert code == 0
    assert "  VAEDecode(samples, vae) → IMAGE" in out
    assert "  CLIPLoader(clip_name, type, device?) → CLIP" in out
    assert "loaders" in out
    assert not any("PrimitiveNode" in line for line in out)


def test_help_needs_no_torch() -> None:
    code = "import sys; from octavo.cli import run; assert 'torch' not in sys.modules, 'torch'"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
