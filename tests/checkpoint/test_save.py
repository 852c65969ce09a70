"""Writing: what comes back is what went in, and a failure leaves no trace."""

from pathlib import Path

import pytest
import safetensors.torch
import torch

from octavo.checkpoint.save import Writer, save_safetensors
from octavo.checkpoint.tensors import open_tensors
from octavo.errors import CheckpointError


def some_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(5, 7, generator=generator)
    return {
        "weight": wide,
        "half": wide.half(),
        "brain": wide.bfloat16(),
        "eighth": wide.to(torch.float8_e4m3fn),
        "other eighth": wide.to(torch.float8_e5m2),
        "scalar": torch.tensor(0.5),
        "codes": torch.arange(3, dtype=torch.uint8),
        "nothing": torch.zeros(0, 4),
        "columns": wide.t(),  # not contiguous
    }


def test_the_reference_implementation_reads_what_we_write(tmp_path: Path) -> None:
    tensors = some_tensors()
    save_safetensors(tmp_path / "a.safetensors", tensors, {"recipe": "row"})
    back = safetensors.torch.load_file(tmp_path / "a.safetensors")
    assert set(back) == set(tensors)
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        assert back[name].shape == tensor.shape
        assert torch.equal(back[name].float(), tensor.float())
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"recipe": "row"}


def test_we_read_what_the_reference_implementation_writes(tmp_path: Path) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in some_tensors().items()}
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors", {"who": "reference"})
    with open_tensors(tmp_path / "a.safetensors") as file:
        assert file.metadata == {"who": "reference"}
        for name, tensor in tensors.items():
            back = file.read(name)
            assert back.dtype == tensor.dtype
            assert torch.equal(back.float(), tensor.float())


def test_every_tensor_starts_at_a_multiple_of_its_element(tmp_path: Path) -> None:
    save_safetensors(tmp_path / "a.safetensors", some_tensors())
    with open_tensors(tmp_path / "a.safetensors") as file:
        for name, tensor in some_tensors().items():
            assert file.entries[name].start % tensor.dtype.itemsize == 0


def test_an_error_while_writing_keeps_the_old_file_and_leaves_no_part(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_safetensors(path, {"old": torch.ones(2)})

    def fail_halfway() -> None:
        with Writer(path, {"x": (torch.float32, (4,)), "y": (torch.float32, (4,))}) as writer:
            writer.write("x", torch.zeros(4))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail_halfway()
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]
    with open_tensors(path) as file:
        assert set(file.entries) == {"old"}


def test_a_file_larger_than_the_disk_is_refused_before_a_byte_is_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"needs .* GB, but its disk has"):
        Writer(tmp_path / "a.safetensors", {"x": (torch.float32, (2**30, 2**20))})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_a_file_is_named_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_safetensors(tmp_path / "taken" / "a.safetensors", {"x": torch.ones(1)})


def test_the_new_file_is_as_readable_as_others(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    save_safetensors(tmp_path / "a.safetensors", {"x": torch.ones(1)})
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
