"""`octavo convert` as a user meets it: the place on stdout, notes on stderr, one line for an error."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from octavo.cli import main as cli
from tests.checkpoint.converting import write_single
from tests.tiny_tree import write_tiny_tree

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.delenv("OCTAVO_MODELS", raising=False)
    write_single(tmp_path / "single.safetensors")

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["octavo", "convert", *words])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        out, err = capsys.readouterr()
        return (exit_.value.code if isinstance(exit_.value.code, int) else 0), out.strip(), err

    return run


def test_there_and_back(run: Run) -> None:
    assert run("single.safetensors", "folder", "--max-shard-size", "200KB")[:2] == (0, "folder")
    assert len(list(Path("folder/transformer").glob("*.safetensors"))) > 1
    assert run("folder", "back.safetensors", "--quiet") == (0, "back.safetensors", "")
    before, after = load_file("single.safetensors"), load_file("back.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_options_choose_part_names_and_dtype(run: Run) -> None:
    run("single.safetensors", "a.safetensors", "--parts", "transformer", "--bare", "--dtype", "bf16")
    tensors = load_file("a.safetensors")
    assert "pos_embed" in tensors
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_a_model_is_found_by_its_name(run: Run, tmp_path: Path) -> None:
    write_tiny_tree(tmp_path / "models")
    assert run("tiny", "folder", "--models-dir", "models")[0] == 0
    assert Path("folder/vae/config.json").is_file()


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("nothing.safetensors", "a"), "There is no model 'nothing.safetensors'"),
        (("single.safetensors", "single.safetensors"), "is what would be read"),
        (("single.safetensors", "a", "--parts", "mdit"), "There is no part 'mdit'. Parts are .* Did you mean 'mmdit'?"),
        (("single.safetensors", "a", "--dtype", "int8"), "There is no dtype 'int8'"),
        (("single.safetensors", "a.safetensors", "--fp8-form", "gguf"), "There is no FP8 form 'gguf'"),
        (("single.safetensors", "a", "--max-shard-size", "lots"), "'lots' is not the size of a file"),
        (("single.safetensors", "a", "--max-shard-size", "0"), "'0' is not the size of a file"),
        (("single.safetensors", "a.safetensors", "--max-shard-size", "1GB"), "there are no shards to limit"),
        (("single.safetensors", "a.gguf"), "a format that is not written"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_message(run: Run, words: tuple[str, ...], complaint: str) -> None:
    before = sorted(Path().rglob("*"))
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert complaint.split(" .* ")[0] in err
    assert complaint.split(" .* ")[-1] in err
    assert "Traceback" not in err
    assert sorted(Path().rglob("*")) == before
