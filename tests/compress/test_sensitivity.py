"""Sensitivity is the error of the velocity with one layer quantized; budgets are kept by it."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from octavo.checkpoint import load_mmdit
from octavo.checkpoint.source import open_source
from octavo.compress.blocks import BlockStream
from octavo.compress.job import quantize_checkpoint
from octavo.compress.points import Points
from octavo.compress.progress import Progress
from octavo.compress.sensitivity import measure
from octavo.fp8 import prepare
from octavo.pipeline.encode import Conditioning
from octavo.quantize import Sensitivity, apply, load_recipe, quantize_layer
from tests.compress.small import model, settings

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    model(root)
    return root


def points() -> Points:
    generator = torch.Generator().manual_seed(0)

    def told() -> Conditioning:
        return Conditioning(torch.randn(1, 8, 128, generator=generator), torch.randn(1, 128, generator=generator))

    latents = torch.randn(2, 16, 8, 8, generator=generator)
    groups, prompts = torch.tensor([0, 3]), torch.tensor([0, 1])
    return Points(
        latents, torch.tensor([0.9, 0.3]), groups, prompts, torch.tensor([True, True]), [told() for _ in "abc"]
    )


def test_the_error_is_that_of_the_whole_model_with_the_layer_quantized(tree: Path) -> None:
    path, recipe, found = tree / "checkpoints" / "tiny.safetensors", load_recipe("row"), points()
    with open_source(path) as source:
        stream = BlockStream(source.require("mmdit"), CPU, torch.float32)
        sensitivity = measure(stream, found, recipe)
        assert sorted(sensitivity.errors) == sorted(stream.plan.linears)
    rows = [(i, which) for i in range(2) for which in (i, 2)]

    def velocity(mmdit: torch.nn.Module) -> torch.Tensor:
        pooled = torch.cat([found.conditionings[which].pooled for _, which in rows])
        sigmas = torch.stack([found.sigmas[i] for i, _ in rows])
        context = torch.cat([found.conditionings[which].context for _, which in rows])
        answer: torch.Tensor = mmdit(
            torch.stack([found.latents[i] for i, _ in rows]), context, mmdit.modulation(1000 * sigmas, pooled)
        )
        return answer

    exact = velocity(load_mmdit(path))
    for name in ("t_embedder.mlp.2", "joint_blocks.0.context_block.attn.qkv", "final_layer.linear"):
        mmdit = load_mmdit(path)
        linear = mmdit.get_submodule(name)
        assert isinstance(linear, torch.nn.Linear)
        apply(mmdit, {name: quantize_layer(name, linear.weight, linear.bias, recipe.default, None)})
        prepare(mmdit, CPU, torch.float32, backend="plain-w8a8")
        expected = float((velocity(mmdit) - exact).norm() / exact.norm())
        assert expected > 1e-4
        assert sensitivity.errors[name] == pytest.approx(expected, rel=1e-2)
        assert sensitivity.weights[name] == linear.weight.numel()


def test_a_share_of_the_weights_stays_in_16_bits(tree: Path, tmp_path: Path) -> None:
    path = tmp_path / "sensitivity.json"
    asked = settings(tree, recipe="row", keep_16bit=0.2, sensitivity=path)
    summary = quantize_checkpoint("tiny", tmp_path / "a.safetensors", asked)
    (written,) = summary.files
    share = 1 - written.fp8_weights / written.linear_weights
    assert 0.1 < share <= 0.2
    assert summary.sensitivity is not None
    assert summary.sensitivity.ranked()[0] in written.kept
    source, result = load_file(tree / "checkpoints" / "tiny.safetensors"), load_file(written.path)
    for name in written.kept:
        full = f"model.diffusion_model.{name}.weight"
        assert torch.equal(result[full], source[full])
    assert Sensitivity.read(path) == summary.sensitivity
    # Measured once: the second job reads the file, and does not even need points.
    reports = list[Progress]()
    quantize_checkpoint("tiny", tmp_path / "b.safetensors", asked, watch=reports.append)
    assert {report.phase for report in reports} == {"write"}
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_a_budget_is_used_and_not_exceeded(tree: Path, tmp_path: Path) -> None:
    (small,) = quantize_checkpoint("tiny", tmp_path / "small.safetensors", settings(tree, recipe="row")).files
    budget = small.nbytes + 200_000
    asked = settings(tree, recipe="row", budget=budget)
    (written,) = quantize_checkpoint("tiny", tmp_path / "a.safetensors", asked).files
    assert budget - 20_000 < written.nbytes <= budget
    assert written.kept
