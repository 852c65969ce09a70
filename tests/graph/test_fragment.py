"""A piece of a workflow is answered with the whole."""

import json
from typing import Any

import pytest

from octavo.graph.fragment import as_json
from octavo.graph.workflow import InvalidPrompt, validate
from tests.graph.compare import FixedLists, declared, recorded_nodes

LISTS = FixedLists(checkpoints=["sd3.5_large_fp8_scaled.safetensors"])
LOADER = {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "sd35_tiny.safetensors"}}
TEXT = {"class_type": "CLIPTextEncode", "inputs": {"text": "a fox"}}
LATENT = {"class_type": "EmptyLatentImage", "inputs": {"width": 1024, "height": 1024, "batch_size": 1}}
SAMPLER: dict[str, Any] = {
    "class_type": "KSampler",
    "inputs": {"seed": 5, "steps": 20, "cfg": 4.5, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0},
}


def _whole(prompt: Any) -> dict[str, Any]:
    """What the refusal of `prompt` shows, which is checked to be a prompt that can be run."""
    specs = {name: declared(entry) for name, entry in recorded_nodes().items()}
    with pytest.raises(InvalidPrompt) as refused:
        validate(prompt, specs, LISTS)
    whole: dict[str, Any] = refused.value.error["extra_info"]["completed"]
    assert json.loads(as_json(whole)) == whole
    assert as_json(whole) in str(refused.value)
    assert validate(whole, specs, LISTS).node_errors == {}
    return whole


def _linked(sampler: dict[str, Any], **links: Any) -> dict[str, Any]:
    return {**sampler, "inputs": {**sampler["inputs"], **links}}


@pytest.mark.parametrize(
    "sampler",
    [
        SAMPLER,
        _linked(SAMPLER, model=["CheckpointLoaderSimple", 0], positive=["CLIPTextEncode", 0], negative=["x", 0]),
        _linked(SAMPLER, model=["4", 0], positive=["6", 0], negative=["7", 0], latent_image=["5", 0]),
        _linked(SAMPLER, model="MODEL", positive=None, latent_image=[[], {}]),
    ],
)
def test_the_piece_that_circulates_is_completed(sampler):
    """Loader, text, empty latents and sampler; the links are missing, or lead to names and ids that are not there."""
    whole = _whole([LOADER, TEXT, LATENT, sampler])

    assert [each["class_type"] for each in whole.values()] == [
        "CheckpointLoaderSimple", "CLIPTextEncode", "EmptyLatentImage", "KSampler",
        "CLIPTextEncode", "VAEDecode", "SaveImage",
    ]  # fmt: skip
    assert whole["2"]["inputs"] == {"text": "a fox", "clip": ["1", 1]}
    assert whole["4"]["inputs"] == {
        **SAMPLER["inputs"],
        "model": ["1", 0],
        "positive": ["2", 0],
        "negative": ["5", 0],
        "latent_image": ["3", 0],
    }
    assert whole["5"]["inputs"] == {"text": "", "clip": ["1", 1]}
    assert whole["6"]["inputs"] == {"samples": ["4", 0], "vae": ["1", 2]}
    assert whole["7"]["inputs"]["images"] == ["6", 0]


def test_two_texts_are_the_positive_and_the_negative():
    negative = {"class_type": "CLIPTextEncode", "inputs": {"text": "blurry"}}

    whole = _whole([LOADER, TEXT, negative, LATENT, SAMPLER])

    assert whole["5"]["inputs"]["positive"] == ["2", 0]
    assert whole["5"]["inputs"]["negative"] == ["3", 0]


def test_missing_values_take_their_defaults():
    whole = _whole([LOADER, {"class_type": "CLIPTextEncode"}, LATENT, {"class_type": "KSampler"}])

    assert whole["2"]["inputs"]["text"] == ""
    assert {name: whole["4"]["inputs"][name] for name in ("steps", "cfg", "sampler_name")} == {
        "steps": 20,
        "cfg": 8.0,
        "sampler_name": "euler",
    }


def test_nodes_with_ids_keep_them():
    given = [{**each, "id": number} for each, number in zip([LOADER, TEXT, LATENT, SAMPLER], [4, 6, 5, 3], strict=True)]

    whole = _whole(given)

    assert list(whole) == ["4", "6", "5", "3", "7", "8", "9"]
    assert whole["3"]["inputs"]["model"] == ["4", 0]


def test_a_workflow_that_saves_nothing_is_completed():
    prompt = {
        "4": LOADER,
        "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a fox", "clip": ["4", 1]}},
        "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "", "clip": ["4", 1]}},
        "5": LATENT,
        "3": _linked(SAMPLER, model=["4", 0], positive=["7", 0], negative=["6", 0], latent_image=["5", 0]),
    }

    whole = _whole(prompt)

    assert {id: each for id, each in whole.items() if id in prompt} == prompt
    assert [each["class_type"] for each in list(whole.values())[5:]] == ["VAEDecode", "SaveImage"]


def test_what_cannot_be_guessed_is_not():
    specs = {name: declared(entry) for name, entry in recorded_nodes().items()}
    with pytest.raises(InvalidPrompt) as refused:
        validate([TEXT, SAMPLER], specs, LISTS)

    assert "completed" not in refused.value.error["extra_info"]
    assert "piece of a workflow" in str(refused.value)
