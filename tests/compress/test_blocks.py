"""The model in stages is the model: the same numbers, with one block at a time in memory."""

from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import nn

from octavo.checkpoint import load_mmdit
from octavo.checkpoint.source import open_source
from octavo.compress.blocks import BlockStream, stage_of, stages
from octavo.compress.stages import Batch
from octavo.errors import RequestError
from octavo.models import MMDiT, MMDiTConfig
from tests.checkpoint.quantized import header, octavo_file
from tests.checkpoint.samples import all_in_one, save_safetensors, tiny

CPU = torch.device("cpu")


@pytest.fixture(params=[True, False], ids=["kept", "dropped"])
def stream(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[BlockStream]:
    save_safetensors(tmp_path / "model.safetensors", all_in_one())
    with open_source(tmp_path / "model.safetensors") as source:
        yield BlockStream(source.require("mmdit"), CPU, torch.float32, keep=request.param)


def batch(config: MMDiTConfig, rows: int, seed: int = 0, skip_layers: tuple[int, ...] = ()) -> Batch:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return Batch(
        draw(rows, 16, 6, 8),
        torch.rand(rows, generator=generator),
        draw(rows, 5, config.context_width),
        draw(rows, config.pooled_width),
        skip_layers=skip_layers,
    )


@torch.inference_mode()
def whole(model: MMDiT, asked: Batch) -> torch.Tensor:
    modulation = model.modulation(1000 * asked.sigma, asked.pooled)
    return model(asked.latents, asked.context, modulation, skip_layers=asked.skip_layers)


def test_the_velocity_is_that_of_the_whole_model_bit_for_bit(stream: BlockStream, tmp_path: Path) -> None:
    asked = [batch(stream.config, 3), batch(stream.config, 1, seed=1), batch(stream.config, 2, 2, skip_layers=(0,))]
    answers = stream.velocities([each.branch() for each in asked])
    model = load_mmdit(tmp_path / "model.safetensors")
    for each, velocity in zip(asked, answers, strict=True):
        assert torch.equal(velocity, whole(model, each))


def test_only_the_stage_at_work_is_in_memory_unless_all_are_kept(stream: BlockStream) -> None:
    seen = []

    def look(_stage: str) -> None:
        seen.append({stage_of(name) for name, tensor in stream.model.state_dict().items() if not tensor.is_meta})

    stream.velocities([batch(stream.config, 1)], done=look)
    every = set(stages(stream.config))
    assert seen[-1] == (every if stream.keep else set())
    with stream.loaded("joint_blocks.1"):
        look("joint_blocks.1")
    assert seen[-1] == (every if stream.keep else {"joint_blocks.1"})
    stream.release()
    assert all(tensor.is_meta for tensor in stream.model.state_dict().values())


def test_every_linear_belongs_to_one_stage(stream: BlockStream) -> None:
    listed = [name for stage in stream.stages for name in stream.linears(stage)]
    assert sorted(listed) == sorted(stream.plan.linears)


def test_weights_come_in_the_dtypes_of_the_file(stream: BlockStream) -> None:
    weight, bias = stream.weights("joint_blocks.0.x_block.attn.qkv")
    expected = tiny("mmdit")
    assert torch.equal(weight, expected["joint_blocks.0.x_block.attn.qkv.weight"])
    assert bias is not None
    assert torch.equal(bias, expected["joint_blocks.0.x_block.attn.qkv.bias"])


def test_a_branch_goes_its_own_way(stream: BlockStream) -> None:
    """What becomes of a branch leaves the batch where it stands."""
    trunk = batch(stream.config, 1)
    for stage in stream.stages[:-2]:
        with stream.loaded(stage):
            stream.advance(stage, [trunk])
    before = cast(torch.Tensor, trunk.image).clone()
    stream.velocities([trunk.branch()], stream.stages[-2:])
    assert torch.equal(cast(torch.Tensor, trunk.image), before)
    assert trunk.velocity is None


def test_another_module_can_stand_in_for_a_stage(stream: BlockStream) -> None:
    with stream.loaded("final_layer"):
        original = stream.module("final_layer")
        with stream.replaced("final_layer", nn.Identity()):
            assert isinstance(stream.module("final_layer"), nn.Identity)
        assert stream.module("final_layer") is original
    assert stream.module("embed") is None


def test_a_model_in_fp8_is_refused(tmp_path: Path) -> None:
    tensors, fields, _ = octavo_file()
    save_safetensors(tmp_path / "fp8.safetensors", tensors, header(fields))
    with open_source(tmp_path / "fp8.safetensors") as source, pytest.raises(RequestError, match="FP8 already"):
        BlockStream(source.require("mmdit"), CPU, torch.float32)
