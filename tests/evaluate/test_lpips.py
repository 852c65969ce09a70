"""LPIPS is the published formula: torchmetrics' own, around the same AlexNet, gives the same numbers."""

import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from octavo.checkpoint.save import save_safetensors
from octavo.errors import CheckpointError, ModelNotFoundError
from octavo.evaluate.lpips import PLACES, WIDTHS, load_lpips

theirs = pytest.importorskip("torchmetrics.functional.image.lpips", reason="the eval extra is not installed")


def torchvision_alexnet() -> nn.Sequential:
    """`torchvision.models.alexnet().features`, as torchvision lists them (Krizhevsky 2014), with random weights."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 64, kernel_size=11, stride=4, padding=2),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(kernel_size=3, stride=2),
        nn.Conv2d(64, 192, kernel_size=5, padding=2),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(kernel_size=3, stride=2),
        nn.Conv2d(192, 384, kernel_size=3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(384, 256, kernel_size=3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(256, 256, kernel_size=3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(kernel_size=3, stride=2),
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    weights = {f"features.{name}": tensor for name, tensor in torchvision_alexnet().state_dict().items()}
    save_safetensors(tmp_path / "alexnet.safetensors", weights, None)
    return tmp_path


def pictures(seed: int, side: int = 64) -> Tensor:
    return torch.randint(256, (2, 3, side, side + 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_distances_are_those_of_torchmetrics(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its linear weights are the published ones, which ours fall back to."""
    monkeypatch.setattr(theirs, "_get_tv_model_features", lambda *_args, **_kwargs: torchvision_alexnet())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        oracle = theirs._LPIPS(net="alex")
    a, b = pictures(1), pictures(2)
    with torch.no_grad():
        wanted = oracle(a.float() / 127.5 - 1, b.float() / 127.5 - 1).flatten()
    torch.testing.assert_close(load_lpips(folder)(a, b), wanted)


def test_own_linear_weights_are_preferred_and_weigh(folder: Path) -> None:
    ones = {f"lin{i}.model.1.weight": torch.ones(1, width, 1, 1) for i, width in enumerate(WIDTHS)}
    save_safetensors(folder / "lpips.safetensors", ones, None)
    once = load_lpips(folder)(pictures(1), pictures(2))
    save_safetensors(folder / "lpips.safetensors", {name: 2 * w for name, w in ones.items()}, None)
    torch.testing.assert_close(load_lpips(folder)(pictures(1), pictures(2)), 2 * once)


def test_equal_pictures_are_no_distance_apart_however_small(folder: Path) -> None:
    small = pictures(3, side=32)
    assert load_lpips(folder)(small, small).tolist() == [0, 0]


def test_files_that_are_missing_damaged_or_others_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"alexnet\.safetensors"):
        load_lpips(tmp_path / "elsewhere")
    (folder / "lpips.safetensors").write_bytes(b"no safetensors at all")
    with pytest.raises(CheckpointError, match=r"lpips\.safetensors"):
        load_lpips(folder)
    save_safetensors(folder / "alexnet.safetensors", {f"features.{PLACES[0]}.weight": torch.zeros(64, 3, 3, 3)}, None)
    with pytest.raises(CheckpointError, match=r"features\.0\.weight is \[64, 3, 3, 3\]"):
        load_lpips(folder)
