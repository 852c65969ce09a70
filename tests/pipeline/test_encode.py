"""Conditioning against ComfyUI's, for every set of encoders."""

import json

import pytest
import torch
from safetensors.torch import load_file

from octavo.models import ClipTextEncoder, T5Encoder
from octavo.pipeline.encode import encode, encode_all
from tests.goldens import golden
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


@pytest.mark.parametrize("case", ["empty", "cat", "weights", "long"])
def test_conditioning_equals_comfyui(models: dict[str, torch.nn.Module], case: str) -> None:
    recorded = load_file(golden("comfyui/text_encoders.safetensors"))
    prompt = json.loads(golden("comfyui/text_encoders.json").read_text())["cases"][case]["prompt"]
    conditioning = encode(encoders(models), prompt)
    torch.testing.assert_close(
        conditioning.context[:, :, ::8], recorded[f"{case}/cond_every8th_channel"], atol=1e-4, rtol=0
    )
    torch.testing.assert_close(conditioning.pooled, recorded[f"{case}/pooled"], atol=1e-4, rtol=0)


PROMPTS = ("a cat", "", "a (cat:1.4) on a (mat:0.7), " + "very, " * 90, "a (dog:1.2)", "a cat")


def test_prompts_that_pass_together_get_what_each_gets_alone(models: dict[str, torch.nn.Module]) -> None:
    """To the last bit, with weights, several chunks and lengths that differ."""
    of = encoders(models)
    for told, prompt in zip(encode_all(of, PROMPTS), PROMPTS, strict=True):
        alone = encode(of, prompt)
        assert torch.equal(told.context, alone.context)
        assert torch.equal(told.pooled, alone.pooled)
    assert encode_all(of, []) == []


def test_what_several_prompts_ask_for_is_encoded_once(
    models: dict[str, torch.nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """CLIP takes chunks: one of each of the four prompts, more of the long one; what weights start from is the empty
    prompt. T5 takes texts whole, at 77 tokens or more: a long one with weights has an empty one of its own.
    """
    texts: dict[type, list[int]] = {ClipTextEncoder: [], T5Encoder: []}
    for owner, counts in texts.items():
        real = owner.encode

        def counted(self: object, told: list[object], real=real, counts=counts, **settings: int) -> object:  # type: ignore[no-untyped-def]
            counts.append(len(told))
            return real(self, told, **settings)

        monkeypatch.setattr(owner, "encode", counted)
    encode_all(encoders(models), PROMPTS)
    assert texts == {ClipTextEncoder: [6, 6], T5Encoder: [5]}


def test_clip_skip_reads_another_layer(models: dict[str, torch.nn.Module]) -> None:
    recorded = load_file(golden("comfyui/text_encoders.safetensors"))
    prompt = json.loads(golden("comfyui/text_encoders.json").read_text())["cases"]["cat"]["prompt"]
    conditioning = encode(encoders(models), prompt, clip_skip=1)
    expected = recorded["cat_clip_skip_minus1/cond_every8th_channel"]
    torch.testing.assert_close(conditioning.context[:, :, ::8], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", SUBSETS)
def test_missing_encoders_leave_zeros_where_comfyui_has_them(models: dict[str, torch.nn.Module], case: str) -> None:
    recorded = load_file(golden("comfyui/text_encoders.safetensors"))
    cases = json.loads(golden("comfyui/text_encoders.json").read_text())["cases"]
    facts, prompt = cases[case], cases["cat"]["prompt"]
    conditioning = encode(encoders(models, SUBSETS[case]), prompt)
    assert list(conditioning.context.shape) == facts["cond_shape"]
    torch.testing.assert_close(conditioning.pooled, recorded[f"{case}/pooled"], atol=1e-4, rtol=0)

    whole = encode(encoders(models), prompt).context
    has_clip = bool(SUBSETS[case] & {"clip_l", "clip_g"})
    if has_clip:
        expected_l = whole[:, :77, :768] if "clip_l" in SUBSETS[case] else torch.zeros(1, 77, 768)
        expected_g = whole[:, :77, 768:2048] if "clip_g" in SUBSETS[case] else torch.zeros(1, 77, 1280)
        assert torch.equal(conditioning.context[:, :77, :2048], torch.cat([expected_l, expected_g], dim=-1))
    if "t5xxl" in SUBSETS[case]:
        assert torch.equal(conditioning.context[:, 77 * has_clip :], whole[:, 77:])
    if case == "none":
        assert not conditioning.context.any()
