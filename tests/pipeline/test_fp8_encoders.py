"""Text encoders in FP8 multiply by the same linear layer as the model, be it from files of their own or all in one."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from octavo import load
from octavo.checkpoint.save import save_safetensors
from octavo.fp8 import E4M3FN, Fp8Linear, dequantize, paths, quantize
from octavo.models import T5Encoder
from tests.tiny_tree import write_tiny_tree

Tensors = dict[str, Tensor]
ENCODERS = ("clip_l", "clip_g", "t5xxl")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_tree(tmp_path_factory.mktemp("tiny") / "models")


def is_linear(name: str, tensor: Tensor) -> bool:
    """Whether it is the matrix of a linear layer: embeddings are matrices too."""
    return (
        tensor.ndim == 2 and "embedding" not in name and not name.endswith(("shared.weight", "attention_bias.weight"))
    )


def cast_all(weights: Tensors) -> tuple[Tensors, Tensors]:
    """As `t5xxl_fp8_e4m3fn.safetensors`: every tensor in FP8, norms and embeddings too. (File, meant values.)"""
    codes = {name: tensor.float().to(E4M3FN.dtype) for name, tensor in weights.items()}
    return codes, {name: code.float() for name, code in codes.items()}


def scaled(weights: Tensors) -> tuple[Tensors, Tensors]:
    """As `t5xxl_fp8_e4m3fn_scaled.safetensors`: linear layers in FP8 with scales, a marker, the rest in 16 bits."""
    file, meant = {"scaled_fp8": torch.zeros(0, dtype=E4M3FN.dtype)}, {}
    for name, tensor in weights.items():
        file[name], meant[name] = tensor, tensor.float()
        if is_linear(name, tensor):
            pair = quantize(tensor)
            file[name], meant[name] = pair.q, dequantize(pair)
            file[name.removesuffix("weight") + "scale_weight"] = pair.scale
    return file, meant


def write(
    tree: Path, root: Path, form: Callable[[Tensors], tuple[Tensors, Tensors]], whole: bool
) -> dict[str, Tensors]:
    """A tree with encoders in FP8, in one file with the model or each in its own; returns what they mean."""
    (root / "checkpoints").mkdir(parents=True)
    (root / "text_encoders").mkdir()
    everything = load_file(tree / "checkpoints" / "tiny.safetensors")
    meant = {}
    for name in ENCODERS:
        file, meant[name] = form(load_file(tree / "text_encoders" / f"{name}.safetensors"))
        if whole:
            everything |= {f"text_encoders.{name}.transformer.{key}": tensor for key, tensor in file.items()}
        else:
            config = {"octavo.config": json.dumps({"kind": name})}
            save_safetensors(root / "text_encoders" / f"{name}.safetensors", file, config)
            shutil.copy(tree / "text_encoders" / f"{name}.tokenizer.json", root / "text_encoders")
    save_safetensors(root / "checkpoints" / "fp8.safetensors", everything, None)
    shutil.copy(tree / "text_encoders" / "clip_l.tokenizer.json", root / "checkpoints" / "fp8.tokenizer.json")
    return meant


@pytest.mark.parametrize("form", [cast_all, scaled], ids=lambda f: f.__name__)
@pytest.mark.parametrize("whole", [False, True], ids=["files of their own", "all in one"])
def test_all_linears_stay_fp8_and_everything_else_is_of_the_compute_dtype(
    tree: Path, tmp_path: Path, form: Callable[[Tensors], tuple[Tensors, Tensors]], whole: bool
) -> None:
    meant = write(tree, tmp_path / "models", form, whole)
    components = load("fp8", models_dir=tmp_path / "models", device="cpu")
    assert len(components.encoders) == len(ENCODERS)
    for name, part in zip(ENCODERS, components.encoders, strict=True):
        encoder = part()
        layers = [module for module in encoder.modules() if isinstance(module, Fp8Linear)]
        assert len(layers) == part.fp8_linears == part.linears
        assert paths(encoder).layers.keys() <= {"cpu", "cpu-blas"}
        for key, tensor in encoder.state_dict().items():
            assert tensor.dtype == (E4M3FN.dtype if key.endswith(".q") else torch.float32), key
        exact = type(encoder)(part.config)  # type: ignore[call-arg]
        exact.load_state_dict(meant[name])
        tokens = torch.randint(3, 11, (2, 7), generator=torch.Generator().manual_seed(0))
        for ours, theirs in zip(outputs(encoder, tokens), outputs(exact, tokens), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def outputs(encoder: nn.Module, tokens: Tensor) -> list[Tensor]:
    """All tensors that it gives."""
    out = encoder(tokens) if isinstance(encoder, T5Encoder) else encoder(tokens, end=torch.tensor([6, 3]))
    return [out] if isinstance(out, Tensor) else list(out)


def test_encoders_take_a_backend_by_name_where_they_have_fp8_weights(tree: Path, tmp_path: Path) -> None:
    write(tree, tmp_path / "models", scaled, whole=False)
    components = load("fp8", models_dir=tmp_path / "models", device="cpu", force_fp8=True, backend="plain-w8a8")
    for part in components.encoders:
        assert paths(part()).layers.keys() == {"plain-w8a8"}
    assert "plain-w8a8" in paths(components.mmdit()).layers
    components = load("tiny", models_dir=tree, device="cpu", force_fp8=True, backend="plain-w8a8")
    assert all(part.refused and not paths(part()).layers for part in components.encoders)
