"""`hires` is what ComfyUI's nodes do for a second, larger pass, number for number."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from octavo import GenerateRequest, generate
from octavo.graph.context import Context
from octavo.pipeline.hires import Hires
from tests.graph.nodes.runs import context_with, run, use

PROMPT = "a red star on a blue background"
AGAIN = "a large red star on a white background"
LINKS = {"model": ["4", 0], "positive": ["6", 0], "negative": ["7", 0]}
FIRST = {
    "4": use("CheckpointLoaderSimple", ckpt_name="octavo-demo.safetensors"),
    "5": use("EmptyLatentImage", width=64, height=48, batch_size=1),
    "6": use("CLIPTextEncode", text=PROMPT, clip=["4", 1]),
    "7": use("CLIPTextEncode", text="", clip=["4", 1]),
    "3": use(
        "KSampler", **LINKS, latent_image=["5", 0],
        seed=3, steps=3, cfg=4.0, sampler_name="dpmpp_2m", scheduler="sgm_uniform", denoise=1.0,
    ),
}  # fmt: skip
SECOND = {
    "8": use("VAEDecode", samples=["18", 0], vae=["4", 2]),
    "out": use("Keep", value=["8", 0]),
}
REQUEST: dict[str, Any] = {
    "prompt": PROMPT, "width": 64, "height": 48, "seed": 3, "steps": 3, "guidance_scale": 4.0,
    "sampler": "dpmpp_2m", "schedule": "sgm_uniform", "shift": 3.0,
}  # fmt: skip


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return context_with(tmp_path)


def again(latent: str, **changes: Any) -> dict[str, Any]:
    same = {
        **LINKS, "seed": 3, "steps": 3, "cfg": 4.0, "sampler_name": "dpmpp_2m", "scheduler": "sgm_uniform",
        "denoise": 0.6,
    }  # fmt: skip
    return use("KSampler", latent_image=[latent, 0], **(same | changes))


def equal(workflow: dict[str, Any], hires: Hires, context: Context) -> bool:
    (drawn,) = generate(context.shelf.components(), GenerateRequest(**REQUEST, hires=hires))
    levels = (run(workflow, context)["out"][0].double() * 255).numpy()
    # Nodes have pixels in [0, 1], the picture was rounded from [-1, 1]: beside a tie float32 may decide otherwise.
    return bool(np.abs(levels - np.asarray(drawn.image)).max() <= 0.5 + 255 * 2**-22)


@pytest.mark.parametrize("method", ["nearest-exact", "bilinear", "area", "bicubic", "bislerp"])
def test_latents_are_enlarged_as_by_latent_upscale_by(context: Context, method: str) -> None:
    larger = use("LatentUpscaleBy", samples=["3", 0], upscale_method=method, scale_by=2.0)
    workflow = {**FIRST, "17": larger, "18": again("17"), **SECOND}
    assert equal(workflow, Hires(scale=2, method=f"latent-{method}", denoise=0.6), context)


@pytest.mark.parametrize("method", ["nearest-exact", "bilinear", "area", "bicubic", "lanczos"])
def test_pixels_are_enlarged_as_by_image_scale(context: Context, method: str) -> None:
    workflow = {
        **FIRST,
        "14": use("VAEDecode", samples=["3", 0], vae=["4", 2]),
        "15": use("ImageScale", image=["14", 0], upscale_method=method, width=96, height=80, crop="center"),
        "17": use("VAEEncode", pixels=["15", 0], vae=["4", 2]),
        "18": again("17"),
        **SECOND,
    }
    assert equal(workflow, Hires(width=96, height=80, method=method, denoise=0.6), context)


def test_the_second_pass_has_its_own_sampler_steps_guidance_and_prompts(context: Context) -> None:
    own = {"steps": 4, "cfg": 2.5, "sampler_name": "euler_ancestral", "scheduler": "karras", "denoise": 0.4}
    workflow = {
        **FIRST,
        "16": use("CLIPTextEncode", text=AGAIN, clip=["4", 1]),
        "12": use("CLIPTextEncode", text="a circle", clip=["4", 1]),
        "17": use("LatentUpscale", samples=["3", 0], upscale_method="bicubic", width=96, height=96, crop="center"),
        "18": again("17", positive=["16", 0], negative=["12", 0], **own),
        **SECOND,
    }
    hires = Hires(
        width=96, height=96, method="latent-bicubic", denoise=0.4, steps=4, guidance_scale=2.5,
        sampler="euler_ancestral", schedule="karras", prompt=AGAIN, negative_prompt="a circle",
    )  # fmt: skip
    assert equal(workflow, hires, context)
