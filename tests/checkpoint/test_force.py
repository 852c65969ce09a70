"""FP8 at load gives the same layers as quantizing a loaded model, without ever holding it in 16 bits."""

import json
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
from torch import nn

from octavo.checkpoint import force
from octavo.checkpoint.force import EXACT, KEPT, force_fp8
from octavo.checkpoint.kinds import Kind
from octavo.checkpoint.load import load_part
from octavo.checkpoint.plan import plan_part
from octavo.checkpoint.save import save_safetensors
from octavo.checkpoint.source import open_source
from octavo.fp8 import E5M2, Fp8Linear, LinearSpec, quantize
from octavo.models import MMDiT
from octavo.pipeline.assemble import EMBEDDED_MODEL
from tests.tiny_tree import MODEL, write_tiny_tree

SPECS = [LinearSpec(granularity="row"), LinearSpec(), LinearSpec(format=E5M2, granularity="row")]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_tree(tmp_path_factory.mktemp("tiny") / "models")


def load(path: Path, kind: Kind, spec: LinearSpec | None) -> tuple[nn.Module, tuple[str, ...]]:
    with open_source(path) as source:
        plan = plan_part(source.require(kind))
        forced = () if spec is None else force_fp8(plan, spec)
        return load_part(plan, "cpu", torch.float32), forced


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_layers_are_those_of_quantizing_the_loaded_weights(
    tree: Path, spec: LinearSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(force, "ROWS_AT_ONCE", 100)  # which divides no weight's rows
    path = tree / "checkpoints" / "tiny.safetensors"
    wide, _ = load(path, "mmdit", None)
    small, forced = load(path, "mmdit", spec)
    assert len(forced) > 10
    for name, module in small.named_modules():
        if isinstance(module, Fp8Linear):
            linear = wide.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            expected = quantize(linear.weight, spec.format, spec.granularity)
            assert torch.equal(module.q.float(), expected.q.float())
            assert torch.equal(module.scale, expected.scale)
            assert module.bias is not None
            assert torch.equal(module.bias, linear.bias)
    others = [name for name in small.state_dict() if name.rpartition(".")[0] not in forced]
    assert all(torch.equal(small.state_dict()[name], wide.state_dict()[name]) for name in others)


def test_few_weights_at_the_end_stay_and_every_pattern_means_something(tree: Path) -> None:
    _, forced = load(tree / "checkpoints" / "tiny.safetensors", "mmdit", SPECS[0])
    mmdit = MMDiT(MODEL)
    linears = {name for name, module in mmdit.named_modules() if isinstance(module, nn.Linear)}
    left = linears - set(forced)
    assert left == {"final_layer.linear"}
    assert all(any(fnmatchcase(name, pattern) for name in linears) for pattern in (*KEPT["mmdit"], *EXACT["mmdit"]))


def test_inputs_of_layers_that_see_no_token_are_never_rounded(tree: Path) -> None:
    model, forced = load(tree / "checkpoints" / "tiny.safetensors", "mmdit", SPECS[0])
    exact = {name for name in forced if model.get_submodule(name).spec.full_precision}
    of_tokens = {name for name in forced if any(part in name for part in (".attn", ".mlp.fc"))}
    assert exact == set(forced) - of_tokens
    assert any("adaLN" in name for name in exact)


@pytest.mark.parametrize(("kind", "name"), [("clip_g", "clip_g"), ("t5", "t5xxl")])
def test_text_encoders_keep_embeddings_norms_and_biases(tree: Path, kind: Kind, name: str) -> None:
    encoder, forced = load(tree / "text_encoders" / f"{name}.safetensors", kind, SPECS[0])
    assert forced
    for key, tensor in encoder.state_dict().items():
        assert (tensor.dtype.itemsize == 1) == key.endswith(".q"), key


def test_what_is_fp8_already_stays_as_it_is() -> None:
    path = EMBEDDED_MODEL.parents[1] / "diffusion_models" / "octavo-demo-fp8.safetensors"
    as_it_is, _ = load(path, "mmdit", None)
    forced, names = load(path, "mmdit", LinearSpec(format=E5M2))
    assert not names
    for name, tensor in as_it_is.state_dict().items():
        assert torch.equal(forced.state_dict()[name].float(), tensor.float())


MEMORY = """
import json, pathlib, sys, torch
from octavo.checkpoint.force import force_fp8
from octavo.checkpoint.load import load_part
from octavo.checkpoint.plan import plan_part
from octavo.checkpoint.source import open_source
from octavo.fp8 import prepare, quantize

def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM:"))

quantize(torch.randn(300, 300))  # whatever torch loads at first use
with open_source(pathlib.Path(sys.argv[1])) as source:
    plan = plan_part(source.require("mmdit"))
    force_fp8(plan)
    before = peak()
    model = load_part(plan, "cpu", torch.bfloat16)
    prepare(model, "cpu", torch.bfloat16, mode="fast")
print(json.dumps([peak() - before, sum(t.nbytes for t in model.state_dict().values())]))  # q too, though on meta
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells the peak")
def test_loading_never_holds_the_model_in_16_bits(tmp_path: Path) -> None:
    """Beside what stays, room for the largest layer in 16 bits and some rows of it in float32; by --fast, too."""
    shape = {"depth": 12, "width": 512, "heads": 8, "pos_embed_size": 8}
    model = MMDiT(type(MODEL)(**shape)).bfloat16()
    in_16_bits = sum(t.nbytes for t in model.state_dict().values())
    largest = max(t.nbytes for t in model.state_dict().values())
    save_safetensors(tmp_path / "m.safetensors", model.state_dict(), None)
    words = [sys.executable, "-c", MEMORY, str(tmp_path / "m.safetensors")]
    grown, kept = json.loads(subprocess.run(words, capture_output=True, text=True, check=True, timeout=120).stdout)
    spare = 3 * largest + (64 << 20)  # what torch and the allocator take varies by tens of megabytes
    assert kept < 0.6 * in_16_bits
    assert kept + spare < in_16_bits  # else the next line could not tell
    assert grown < kept + spare
