"""Loading puts fused steps on a model, or says why not."""

import logging
from functools import partial

import pytest
import torch

import octavo
from octavo.fp8 import fused
from octavo.fp8.fused import FusedOps
from octavo.fp8.modulate import DEFINITIONS
from octavo.models import MMDiT, MMDiTConfig, T5Config, T5Encoder
from octavo.models.ops import PLAIN, each_with_ops
from octavo.pipeline import fusing

CPU = torch.device("cpu")


def test_a_cpu_keeps_the_plain_steps_and_the_log_says_why(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="octavo"):
        mmdit = octavo.load(device="cpu").mmdit()
    assert "steps between products are plain: a fused one runs on cuda, this is cpu" in caplog.text
    assert all(part.ops is PLAIN for part in each_with_ops(mmdit))


def test_where_steps_can_be_fused_every_block_takes_them(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Large has 38 joint blocks, the last of which ends early in its text."""
    monkeypatch.setattr(fusing, "unfit", lambda _device, _dtype: None)
    monkeypatch.setattr(fusing, "fuse", partial(fused.fuse, kernels=DEFINITIONS, needs=()))
    with caplog.at_level(logging.INFO, logger="octavo"):
        mmdit = octavo.load(device="cpu").mmdit()
    assert "steps fused into 8 bits" in caplog.text
    assert all(isinstance(part.ops, FusedOps) for part in each_with_ops(mmdit))
    with torch.device("meta"):
        large = MMDiT(MMDiTConfig.large())
    lines = fusing.fuse_steps(large, CPU, torch.float32, rows=lambda _name: 1, measure=False)
    assert lines[0] == "0 of 377 steps fused into 8 bits, 302 in 16, 75 plain"


def test_models_without_such_steps_are_left_alone() -> None:
    encoder = T5Encoder(T5Config(layers=1, vocab_size=10, width=16, heads=2, head_width=8, mlp_width=16))
    assert fusing.fuse_steps(encoder, CPU, torch.float32, rows=lambda _name: 1, measure=None) == []
