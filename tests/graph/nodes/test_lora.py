"""LoRA nodes: declared as ComfyUI's, and drawing what a request with the same LoRAs draws."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from octavo import GenerateRequest, generate
from octavo.graph.context import Context
from octavo.graph.nodes import lora
from octavo.pipeline.request import Lora
from tests.graph.compare import differences
from tests.graph.nodes.runs import context_with, run, use
from tests.graph.nodes.test_embedded_workflow import PROMPT, WORKFLOW
from tests.lora_files import CLIP_LAYERS, MMDIT_LAYERS, low_rank, write_lora


@pytest.fixture
def context(tmp_path: Path) -> Context:
    context = context_with(tmp_path)
    components = context.shelf.components()
    mmdit = low_rank(components.mmdit.skeleton, MMDIT_LAYERS, size=0.3)
    clip = low_rank(components.encoders[0].skeleton, CLIP_LAYERS, size=0.5)
    write_lora(tmp_path / "loras" / "style.safetensors", mmdit=mmdit, clip_l=clip)
    return context


@pytest.mark.parametrize("spec", lora.NODES, ids=lambda spec: spec.name)
def test_they_are_declared_as_comfyui_declares_them(spec: Any) -> None:
    assert differences(spec) == []
    assert spec.description


def pixels(context: Context, changes: dict[str, Any]) -> np.ndarray:
    image: torch.Tensor = run(WORKFLOW | changes, context)["out"][0]
    return (image * 255).round().to(torch.uint8).numpy()


def drawn(context: Context, *loras: Lora) -> np.ndarray:
    request = GenerateRequest(
        prompt=PROMPT, width=64, height=64, seed=3, steps=3, guidance_scale=4.0,
        sampler="dpmpp_2m", schedule="sgm_uniform", shift=3.0, loras=loras,
    )  # fmt: skip
    (picture,) = generate(context.shelf.components(), request)
    return np.asarray(picture.image)


def test_both_nodes_draw_what_a_request_draws(context: Context) -> None:
    clip_nodes = {
        name: WORKFLOW[name] | {"inputs": WORKFLOW[name]["inputs"] | {"clip": ["20", 1]}} for name in ("6", "7")
    }
    sampler = WORKFLOW["3"] | {"inputs": WORKFLOW["3"]["inputs"] | {"model": ["20", 0]}}
    name = "style.safetensors"
    both = use("LoraLoader", model=["4", 0], clip=["4", 1], lora_name=name, strength_model=0.8, strength_clip=-0.5)
    assert np.array_equal(
        pixels(context, {"20": both, "3": sampler} | clip_nodes), drawn(context, Lora(name, 0.8, -0.5))
    )
    first = use("LoraLoaderModelOnly", model=["4", 0], lora_name=name, strength_model=0.5)
    twice = use("LoraLoaderModelOnly", model=["19", 0], lora_name=name, strength_model=-0.2)
    several = pixels(context, {"19": first, "20": twice, "3": sampler})
    assert np.array_equal(several, drawn(context, Lora(name, 0.5, 0.0), Lora(name, -0.2, 0.0)))
    plain = pixels(context, {})
    assert np.array_equal(plain, drawn(context))
    assert not np.array_equal(plain, several)
