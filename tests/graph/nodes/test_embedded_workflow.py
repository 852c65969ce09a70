"""The usual workflow on the embedded model."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from octavo import GenerateRequest, generate
from octavo.graph.context import Context
from tests.graph.nodes.runs import context_with, run, use

PROMPT = "a red star on a blue background"
WORKFLOW = {
    "4": use("CheckpointLoaderSimple", ckpt_name="octavo-demo.safetensors"),
    "5": use("EmptyLatentImage", width=64, height=64, batch_size=1),
    "6": use("CLIPTextEncode", text=PROMPT, clip=["4", 1]),
    "7": use("CLIPTextEncode", text="", clip=["4", 1]),
    "3": use(
        "KSampler",
        model=["4", 0], positive=["6", 0], negative=["7", 0], latent_image=["5", 0],
        seed=3, steps=3, cfg=4.0, sampler_name="dpmpp_2m", scheduler="sgm_uniform", denoise=1.0,
    ),
    "8": use("VAEDecode", samples=["3", 0], vae=["4", 2]),
    "out": use("Keep", value=["8", 0]),
}  # fmt: skip


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return context_with(tmp_path)


def test_a_workflow_draws_what_generate_draws(context: Context) -> None:
    request = GenerateRequest(
        prompt=PROMPT, width=64, height=64, seed=3, steps=3, guidance_scale=4.0,
        sampler="dpmpp_2m", schedule="sgm_uniform", shift=3.0,
    )  # fmt: skip
    (drawn,) = generate(context.shelf.components(), request)
    pixels = (run(WORKFLOW, context)["out"][0] * 255).round().to(torch.uint8).numpy()
    assert np.array_equal(pixels, np.asarray(drawn.image))


def test_previews_by_the_vae_are_made_where_the_device_is_owned(context: Context) -> None:
    looked: list[Image.Image] = []

    def on_device(work: Any) -> Any:
        result = work()
        if isinstance(result, Image.Image):
            looked.append(result)
        return result

    def emit(kind: str, data: dict[str, Any]) -> None:
        if kind == "preview":
            data["image"]()

    run(WORKFLOW, replace(context, on_device=on_device), emit)
    assert [image.size for image in looked] == [(32, 32)] * 3, "half the side, for a quarter of the work"
