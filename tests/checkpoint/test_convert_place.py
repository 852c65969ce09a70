"""Conversion: where it may write, what it refuses, and that a failure leaves no trace."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from octavo.checkpoint.describe import describe
from octavo.checkpoint.save import save_safetensors
from octavo.errors import CheckpointError, CorruptFileError, RequestError, WrongModelError
from tests.checkpoint.converting import convert, write_single
from tests.checkpoint.quantized import header, octavo_file
from tests.checkpoint.samples import tiny, write_diffusers_folder


@pytest.fixture
def single(tmp_path: Path) -> Path:
    return write_single(tmp_path / "single.safetensors")


def refused(source: Path, to: Path, error: type[Exception], match: str, **wishes: object) -> None:
    before = sorted(source.parent.rglob("*"))
    with pytest.raises(error, match=match):
        convert(source, to, **wishes)
    assert sorted(source.parent.rglob("*")) == before


def test_what_is_there_is_replaced_only_when_asked(tmp_path: Path, single: Path) -> None:
    for to in (tmp_path / "out.safetensors", tmp_path / "out"):
        convert(single, to, parts=("vae",))
        refused(single, to, RequestError, "is there already.*--force")
        convert(single, to, parts=("mmdit",), force=True)
        assert [part.kind for part in describe(to).parts] == ["mmdit"]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_folder_of_other_things_is_never_replaced(tmp_path: Path, single: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    refused(single, tmp_path / "home", RequestError, "with other things than a diffusers model", force=True)
    (tmp_path / "empty").mkdir()
    convert(single, tmp_path / "empty")
    assert (tmp_path / "empty" / "model_index.json").is_file()


def test_the_source_is_never_written_over(tmp_path: Path, single: Path) -> None:
    refused(single, single, RequestError, "is what would be read", force=True)
    folder = write_diffusers_folder(tmp_path / "folder")
    refused(folder, folder, RequestError, "is what would be read", force=True)


@pytest.mark.parametrize(
    ("to", "wishes", "complaint"),
    [
        ("out.ckpt", {}, "a format that is not written"),
        ("out.safetensors", {"bare": True}, "would mix the diffusion model and the VAE"),
        ("out", {"bare": True}, "Names without prefix are for single files"),
        ("out", {"form": "octavo"}, "Forms of FP8 are for single files"),
        ("out.safetensors", {"shard_bytes": 1000}, "is one file, so there are no shards"),
    ],
)
def test_wishes_that_cannot_be_met_are_refused(
    single: Path, tmp_path: Path, to: str, wishes: dict[str, object], complaint: str
) -> None:
    refused(single, tmp_path / to, RequestError, complaint, **wishes)


def test_comfyuis_form_is_not_written_for_what_it_cannot_say(tmp_path: Path) -> None:
    tensors, form, _ = octavo_file(granularity="row")
    save_safetensors(tmp_path / "q.safetensors", tensors, header(form))
    refused(
        tmp_path / "q.safetensors", tmp_path / "c.safetensors", RequestError, "ComfyUI does not read", form="comfyui"
    )


def test_a_part_that_is_not_there_is_named(tmp_path: Path, single: Path) -> None:
    refused(single, tmp_path / "out.safetensors", WrongModelError, "but no text encoder T5", parts=("t5",))


def test_what_is_no_model_is_named(tmp_path: Path) -> None:
    save_safetensors(tmp_path / "l.safetensors", {"lora_unet_x.lora_down.weight": torch.zeros(4, 8)})
    refused(tmp_path / "l.safetensors", tmp_path / "out", WrongModelError, "is a LoRA")


@pytest.mark.parametrize("to", ["out.safetensors", "out"])
def test_nothing_is_left_of_a_conversion_that_fails(tmp_path: Path, to: str) -> None:
    tensors = tiny("mmdit")
    tensors["final_layer.linear.weight"][0, 0] = torch.nan
    save_safetensors(tmp_path / "a.safetensors", tensors)
    refused(
        tmp_path / "a.safetensors", tmp_path / to, CorruptFileError, "NaN or infinity in 'final_layer.linear.weight'"
    )


def test_a_disk_without_room_is_found_before_a_byte_is_written(
    tmp_path: Path, single: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=1000))
    for to in ("out.safetensors", "out"):
        refused(single, tmp_path / to, CheckpointError, "needs .* GB, but its disk has")


MEMORY = """
import sys, torch
from pathlib import Path
from octavo.checkpoint.convert import Wishes, plan_conversion
from octavo.checkpoint.source import open_source

def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM:"))

torch.zeros(1 << 20).to(torch.float16)  # whatever torch loads at first use
with open_source(Path(sys.argv[1])) as source:
    conversion = plan_conversion(source, Path(sys.argv[2]), Wishes(dtype=torch.float32))
    before = peak()
    conversion.run()
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells the peak")
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """A table of positions of 38 MB, 75 MB as float32: what is held are some chunks of 4 MB, read and cast."""
    tensors = tiny("mmdit")
    tensors["pos_embed"] = torch.zeros(1, 384 * 384, 128, dtype=torch.float16)
    save_safetensors(tmp_path / "a.safetensors", tensors)
    words = [sys.executable, "-c", MEMORY, str(tmp_path / "a.safetensors"), str(tmp_path / "folder")]
    grown = int(subprocess.run(words, capture_output=True, text=True, check=True, timeout=120).stdout)
    assert grown < 32 << 20
