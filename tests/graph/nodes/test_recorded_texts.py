"""Text nodes give the conditioning that ComfyUI gives, with every set of encoders."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from octavo.graph.context import Context
from octavo.graph.nodes import text
from octavo.graph.spec import NodeSpec
from octavo.pipeline.encode import Conditioning
from octavo.pipeline.shelf import Clip
from tests.goldens import golden
from tests.graph.nodes.runs import context_with
from tests.recorded_encoders import encoders, recorded_encoders

SUBSETS = {
    "only_l": {"clip_l"},
    "only_g": {"clip_g"},
    "only_t5": {"t5xxl"},
    "l_g": {"clip_l", "clip_g"},
    "l_t5": {"clip_l", "t5xxl"},
    "g_t5": {"clip_g", "t5xxl"},
    "none": set[str](),
}


@pytest.fixture(scope="module")
def models() -> dict[str, torch.nn.Module]:
    return recorded_encoders()


@pytest.fixture(scope="module")
def recorded() -> dict[str, Tensor]:
    return load_file(golden("comfyui/text_encoders.safetensors"))


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return context_with(tmp_path)


def prompt_of(case: str) -> str:
    return str(json.loads(golden("comfyui/text_encoders.json").read_text())["cases"][case]["prompt"])


def told(spec: NodeSpec, context: Context, **inputs: Any) -> Conditioning:
    outputs = spec.run(context, **inputs)
    assert isinstance(outputs, tuple)
    ((condition,),) = outputs
    found = condition.conditioning
    assert isinstance(found, Conditioning)
    return found


@pytest.mark.parametrize("case", ["empty", "cat", "weights", "long"])
def test_a_text_is_told_as_comfyui_tells_it(
    context: Context, models: dict[str, torch.nn.Module], recorded: dict[str, Tensor], case: str
) -> None:
    clip = Clip(encoders(models), (), "recorded")
    prompt = prompt_of(case)
    of_one = told(text.clip_text_encode, context, text=prompt, clip=clip)
    torch.testing.assert_close(of_one.context[:, :, ::8], recorded[f"{case}/cond_every8th_channel"], atol=1e-4, rtol=0)
    torch.testing.assert_close(of_one.pooled, recorded[f"{case}/pooled"], atol=1e-4, rtol=0)
    texts = {"clip_l": prompt, "clip_g": prompt, "t5xxl": prompt}
    of_three = told(text.clip_text_encode_sd3, context, clip=clip, empty_padding="empty_prompt", **texts)
    assert torch.equal(of_three.context, of_one.context)


@pytest.mark.parametrize("case", SUBSETS)
def test_no_text_for_an_encoder_is_told_as_comfyui_tells_a_missing_one(
    context: Context, models: dict[str, torch.nn.Module], recorded: dict[str, Tensor], case: str
) -> None:
    """But for one CLIP of the two, which then reads an empty text: its half of the pooled text is that of ""."""
    prompt, asked = prompt_of("cat"), SUBSETS[case]
    texts = {name: prompt if name in asked else "" for name in ("clip_l", "clip_g", "t5xxl")}
    clip = Clip(encoders(models), (), "recorded")
    found = told(text.clip_text_encode_sd3, context, clip=clip, empty_padding="none", **texts)
    facts = json.loads(golden("comfyui/text_encoders.json").read_text())["cases"][case]
    assert list(found.context.shape) == facts["cond_shape"]
    expected = recorded[f"{case}/pooled"].clone()
    if asked & {"clip_l", "clip_g"}:
        for name, channels in (("clip_l", slice(0, 768)), ("clip_g", slice(768, 2048))):
            if name not in asked:
                expected[:, channels] = recorded["empty/pooled"][:, channels]
    torch.testing.assert_close(found.pooled, expected, atol=1e-4, rtol=0)


def test_the_last_layer_is_told_as_comfyui_tells_it(
    context: Context, models: dict[str, torch.nn.Module], recorded: dict[str, Tensor]
) -> None:
    clip = Clip(encoders(models), (), "recorded")
    (last,) = text.clip_set_last_layer.run(context, clip=clip, stop_at_clip_layer=-1)
    found = told(text.clip_text_encode, context, text=prompt_of("cat"), clip=last)
    expected = recorded["cat_clip_skip_minus1/cond_every8th_channel"]
    torch.testing.assert_close(found.context[:, :, ::8], expected, atol=1e-4, rtol=0)
