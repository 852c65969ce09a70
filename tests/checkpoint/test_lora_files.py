"""LoRA files written, described, and merged into models."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from octavo.checkpoint.convert import PREFIXES
from octavo.checkpoint.folders import EMBEDDED
from octavo.checkpoint.load import load_clip, load_mmdit
from octavo.checkpoint.lora import read_lora
from octavo.checkpoint.lora_form import FORMS, LoraForm, tensors_of
from octavo.checkpoint.lora_info import describe_lora
from octavo.checkpoint.lora_merge import MERGED_KEY, plan_merge
from octavo.checkpoint.save import save_safetensors
from octavo.checkpoint.source import open_source
from octavo.checkpoint.tensors import open_tensors
from octavo.errors import RequestError, WrongModelError
from octavo.fp8 import Fp8Linear
from octavo.models import MMDiT
from octavo.models.adapter import LowRank, weight_of
from tests.lora_files import CLIP_LAYERS, MMDIT_LAYERS, low_rank, write_lora
from tests.tiny_tree import MODEL, write_tiny_tree

DEMO = EMBEDDED / "checkpoints" / "octavo-demo.safetensors"
DEMO_FP8 = EMBEDDED / "diffusion_models" / "octavo-demo-fp8.safetensors"


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_tree(tmp_path_factory.mktemp("models"))


def linears(model: nn.Module) -> list[str]:
    return [name for name, layer in model.named_modules() if hasattr(layer, "in_features")]


@pytest.mark.parametrize("alpha", [None, 2.0])
@pytest.mark.parametrize("form", FORMS)
def test_what_is_written_is_read_as_the_same_change(tmp_path: Path, form: LoraForm, alpha: float | None) -> None:
    """Of every layer: those that are three in diffusers, and those whose halves swap there, too."""
    with torch.device("meta"):
        model = MMDiT(MODEL)
    generator = torch.Generator().manual_seed(1)
    changes = {}
    for name in linears(model):
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        down, up = (
            torch.randn(*shape, generator=generator) for shape in ((3, layer.in_features), (layer.out_features, 3))
        )
        changes[name] = LowRank(down, up)
    path = tmp_path / "mine.safetensors"
    save_safetensors(path, tensors_of(changes, form, depth=MODEL.depth, alpha=alpha, dtype=torch.float32))
    read = read_lora(path, {"mmdit": model})["mmdit"]
    assert set(read.layers) == set(changes)
    for name, change in changes.items():
        assert torch.allclose(read.layers[name].dense(), change.dense(), atol=1e-5), name
    assert set(describe_lora(path).ranks) == {3}


def test_a_file_is_described_by_its_header(tmp_path: Path) -> None:
    layers = {"joint_blocks.0.x_block.attn.qkv": 4, "joint_blocks.1.x_block.mlp.fc1": 8}
    tensors: dict[str, Tensor] = {}
    for name, rank in layers.items():
        tensors |= {f"{name}.lora_down.weight": torch.zeros(rank, 8), f"{name}.lora_up.weight": torch.zeros(8, rank)}
    tensors["joint_blocks.1.x_block.mlp.fc1.dora_scale"] = torch.ones(8)
    clip = {"text_model.encoder.layers.0.mlp.fc1.lokr_w1": torch.ones(2, 2)}
    clip["text_model.encoder.layers.0.mlp.fc1.lokr_w2"] = torch.ones(2, 2)
    info = describe_lora(write_lora(tmp_path / "a.safetensors", mmdit=tensors, clip_l=clip))
    assert info.kinds == {"LoRA": 1, "DoRA (LoRA)": 1, "LoKr": 1}
    assert info.ranks == {4: 1, 8: 1}
    assert info.parts == {"mmdit": 2, "clip_l": 1}
    with pytest.raises(WrongModelError, match="none of its"):
        describe_lora(DEMO)


def merge(source: Path, loras: list[tuple[Path, float]], to: Path, *, force: bool = False) -> Path:
    with open_source(source) as opened:
        plan_merge(opened, loras, to, force=force).run()
    return to


@pytest.mark.parametrize("source", [DEMO, DEMO_FP8], ids=["16 bits", "FP8"])
def test_merged_weights_are_the_sum_rounded_once(tmp_path: Path, source: Path) -> None:
    """Half a step of the file's float16 or of bfloat16 at most; what no LoRA changes stays what it was."""
    before = load_mmdit(source)
    one, other = (low_rank(before, MMDIT_LAYERS, size=0.3, seed=seed) for seed in (0, 1))
    loras = [
        (write_lora(tmp_path / "one.safetensors", mmdit=one), 0.8),
        (write_lora(tmp_path / "two.safetensors", mmdit=other), -0.5),
    ]
    to = merge(source, loras, tmp_path / "merged.safetensors")
    after = load_mmdit(to)
    for name in linears(after):
        layer = after.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        expected = weight_of(before.get_submodule(name))
        if name in MMDIT_LAYERS:
            for tensors, strength in ((one, 0.8), (other, -0.5)):
                expected = expected + strength * tensors[f"{name}.lora_up.weight"] @ tensors[f"{name}.lora_down.weight"]
        bound = expected.abs() * 2**-8 + 1e-7
        assert bool(((layer.weight - expected).abs() <= bound).all()), name
    with open_tensors(to) as file, open_tensors(source) as origin:
        assert json.loads(file.metadata[MERGED_KEY])[0] == {"name": "one.safetensors", "strength": 0.8}
        assert {entry.dtype for entry in file.entries.values()} <= {"F16", "BF16", "F32"}
        for name in origin.entries:
            if name.startswith("first_stage_model."):
                assert torch.equal(file.read(name), origin.read(name))


def test_text_encoders_in_the_same_file_are_merged_too(tmp_path: Path, tree: Path) -> None:
    clip = load_clip(tree / "text_encoders" / "clip_l.safetensors")
    with open_tensors(tree / "checkpoints" / "tiny.safetensors") as file:
        tensors = {name: file.read(name) for name in file.entries}
    with open_tensors(tree / "text_encoders" / "clip_l.safetensors") as file:
        tensors |= {PREFIXES["clip_l"] + name: file.read(name) for name in file.entries}
    config = {"octavo.config": json.dumps({"clip_l": {"kind": "clip_l"}})}
    save_safetensors(tmp_path / "whole.safetensors", tensors, config)
    changes = low_rank(clip, CLIP_LAYERS, size=0.5)
    lora = write_lora(tmp_path / "text.safetensors", clip_l=changes)
    to = merge(tmp_path / "whole.safetensors", [(lora, 0.5)], tmp_path / "merged.safetensors")
    name = CLIP_LAYERS[0]
    with open_tensors(to) as file:
        merged = file.read(f"{PREFIXES['clip_l']}{name}.weight", torch.float32)
    expected = weight_of(clip.get_submodule(name)) + 0.5 * (
        changes[f"{name}.lora_up.weight"] @ changes[f"{name}.lora_down.weight"]
    )
    assert torch.allclose(merged, expected, atol=2e-3)


def test_what_cannot_be_merged_is_refused(tmp_path: Path) -> None:
    before = load_mmdit(DEMO)
    lora = write_lora(tmp_path / "one.safetensors", mmdit=low_rank(before, MMDIT_LAYERS, size=0.3))
    with pytest.raises(RequestError, match="No LoRA"):
        merge(DEMO, [], tmp_path / "a.safetensors")
    with pytest.raises(RequestError, match="no name of a file"):
        merge(DEMO, [(lora, 1.0)], tmp_path / "folder")
    (tmp_path / "there.safetensors").write_bytes(b"")
    with pytest.raises(RequestError, match="there already"):
        merge(DEMO, [(lora, 1.0)], tmp_path / "there.safetensors")
    with pytest.raises(RequestError, match=r"values beyond 65504"):
        merge(DEMO, [(lora, 1e6)], tmp_path / "a.safetensors")
    assert not (tmp_path / "a.safetensors").exists()
    assert not isinstance(before.get_submodule(MMDIT_LAYERS[0]), Fp8Linear)
