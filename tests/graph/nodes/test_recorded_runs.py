"""Workflows give the latents that ComfyUI gives for them: every recorded run, built from nodes."""

import json
from typing import Any

import pytest
import torch

from octavo.graph.context import Context
from tests.goldens import golden
from tests.graph.nodes.runs import MODEL, context_with, run, use, write_recorded_model
from tests.pipeline.recorded import recorded

Prompt = dict[str, Any]


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Context:
    return context_with(write_recorded_model(tmp_path_factory.mktemp("models")))


BASE: Prompt = {
    "model": use("UNETLoader", unet_name=MODEL, weight_dtype="default"),
    "pos": use("RecordedText", name="pos"),
    "neg": use("RecordedText", name="neg"),
    "pos2": use("RecordedText", name="pos2"),
    "start": use("EmptySD3LatentImage", width=64, height=64, batch_size=1),
    "mask": use("RecordedMask"),
    "sampler": {"class_type": "KSampler", "inputs": {}},
    "out": use("Keep", value=["sampler", 0]),
}
IMAGE: Prompt = {"start": use("RecordedLatent")}
INPAINT: Prompt = {
    "image": use("RecordedLatent"),
    "start": use("SetLatentNoiseMask", samples=["image", 0], mask=["mask", 0]),
}
SLG_SD3 = use("SkipLayerGuidanceSD3", model=["model", 0], layers="0", scale=3.0, start_percent=0.0, end_percent=1.0)
SLG_DIT = use(
    "SkipLayerGuidanceDiT",
    model=["model", 0],
    double_layers="0",
    single_layers="",
    scale=3.0,
    start_percent=0.01,
    end_percent=0.5,
    rescaling_scale=0.5,
)


def combined(**more: Any) -> Prompt:
    """The first prompt, and beside it the node called `second`."""
    return {
        **more,
        "positive": use(
            "ConditioningCombine", conditioning_1=[more.pop("first", "pos"), 0], conditioning_2=["second", 0]
        ),
    }


# What of each case differs from the plain one, beside the numbers that the recording lists. `model`, `positive` and
# `negative` of the sampler come from the nodes `edited`, `positive` and `negative` where there are such.
CASES: dict[str, Prompt] = {
    "txt2img": {},
    "batch2": {"start": use("EmptySD3LatentImage", width=64, height=64, batch_size=2)},
    "batch_index": {
        "two": use("EmptySD3LatentImage", width=64, height=64, batch_size=2),
        "start": use("PlacedInBatch", samples=["two", 0], places="3,0"),
    },
    "empty_4_channels": {"start": use("EmptyLatentImage", width=64, height=64, batch_size=1)},
    "nonsquare_odd": {"start": use("EmptyLatentImage", width=104, height=72, batch_size=1)},
    "cfg1": {},
    "cfg_zero_out_negative": {"negative": use("ConditioningZeroOut", conditioning=["neg", 0])},
    "different_token_counts": {"positive": use("RecordedText", name="pos2")},
    "img2img_denoise_0.5": IMAGE,
    "denoise_0": IMAGE,
    "inpaint_mask": INPAINT,
    "inpaint_mask_denoise1": INPAINT,
    "inpaint_ddim": INPAINT,
    "euler_ancestral": {},
    "dpmpp_2m": {},
    "dpmpp_2m_sde": {},
    "uni_pc": {},
    "euler_cfg_pp": {},
    "beta8": {},
    "combine": combined(second=use("RecordedText", name="pos2")),
    "concat": {"positive": use("ConditioningConcat", conditioning_to=["pos", 0], conditioning_from=["pos2", 0])},
    "average": {
        "positive": use(
            "ConditioningAverage",
            conditioning_to=["pos", 0], conditioning_from=["pos2", 0], conditioning_to_strength=0.7,
        )
    },
    "timestep_range": {
        "early": use("ConditioningSetTimestepRange", conditioning=["pos", 0], start=0.0, end=0.5),
        "late": use("ConditioningSetTimestepRange", conditioning=["pos2", 0], start=0.5, end=1.0),
        "positive": use("ConditioningCombine", conditioning_1=["early", 0], conditioning_2=["late", 0]),
    },
    # 32 pixels at 16, 8: fewer than ConditioningSetArea takes, so in fractions of the sides.
    "area": combined(
        second=use(
            "ConditioningSetAreaPercentage",
            conditioning=["pos2", 0], width=0.5, height=0.5, x=0.25, y=0.125, strength=1.0,
        )
    ),
    "cond_mask": combined(
        second=use(
            "ConditioningSetMask", conditioning=["pos2", 0], mask=["mask", 0], strength=0.8, set_cond_area="default"
        )
    ),
    "slg_scale3": {"edited": SLG_SD3},
    "slg_range_rescale": {"edited": SLG_DIT},
    "shift5": {"edited": use("ModelSamplingSD3", model=["model", 0], shift=5.0)},
    "rescale_cfg": {"edited": use("RescaleCFG", model=["model", 0], multiplier=0.7)},
    "adv_first_half": {},
    "adv_second_half": {
        "first": use(
            "KSamplerAdvanced",
            model=["model", 0], positive=["pos", 0], negative=["neg", 0], latent_image=["empty", 0],
            add_noise="enable", noise_seed=1, steps=6, cfg=4.5, sampler_name="euler", scheduler="sgm_uniform",
            start_at_step=0, end_at_step=3, return_with_leftover_noise="enable",
        ),
        "empty": BASE["start"],
        "start": use("LatentFromBatch", samples=["first", 0], batch_index=0, length=1),
    },
    "full6": {},
    "adv_force_full_denoise": {},
    "adv_middle_img": IMAGE,
}  # fmt: skip


def workflow(case: str) -> Prompt:
    """The recorded run as a prompt of ComfyUI's API format."""
    facts = json.loads(golden("comfyui/pipeline.json").read_text())["cases"][case]
    numbers = {key: value for key, value in facts.items() if key not in ("node", "note", "sampler")}
    prompt = {**BASE, **CASES[case]}
    prompt["sampler"] = use(
        facts["node"],
        **numbers,
        sampler_name=facts["sampler"],
        model=["edited" if "edited" in prompt else "model", 0],
        positive=["positive" if "positive" in prompt else "pos", 0],
        negative=["negative" if "negative" in prompt else "neg", 0],
        latent_image=["start", 0],
    )
    return prompt


@pytest.mark.parametrize("case", CASES)
def test_a_workflow_gives_the_latents_of_comfyui(context: Context, case: str) -> None:
    out = run(workflow(case), context)["out"]
    torch.testing.assert_close(out["samples"], recorded()[f"out/{case}"], atol=1e-4, rtol=0)


GUIDED = use("CFGGuider", model=["model", 0], positive=["pos", 0], negative=["neg", 0], cfg=4.5)
CUSTOM: Prompt = {
    **BASE,
    "noise": use("RandomNoise", noise_seed=1),
    "euler": use("KSamplerSelect", sampler_name="euler"),
    "all": use("BasicScheduler", model=["model", 0], scheduler="sgm_uniform", steps=4, denoise=1.0),
    "split": use("SplitSigmas", sigmas=["all", 0], step=3),
}


def custom(guider: Any, sigmas: list[Any]) -> Prompt:
    sampler = use(
        "SamplerCustomAdvanced",
        noise=["noise", 0],
        guider=["guider", 0],
        sampler=["euler", 0],
        sigmas=sigmas,
        latent_image=["start", 0],
    )
    return {**CUSTOM, "guider": guider, "sampler": sampler, "denoised": use("Keep", value=["sampler", 1])}


def test_custom_sampling_gives_the_result_and_the_last_estimate_of_comfyui(context: Context) -> None:
    kept = run(custom(GUIDED, ["split", 0]), context)
    for id, case in (("out", "custom_advanced_3_of_4"), ("denoised", "custom_advanced_3_of_4_denoised")):
        torch.testing.assert_close(kept[id]["samples"], recorded()[f"out/{case}"], atol=1e-4, rtol=0)


def test_a_guider_without_negative_gives_the_latents_of_comfyui(context: Context) -> None:
    guider = use("BasicGuider", model=["model", 0], conditioning=["pos", 0])
    out = run(custom(guider, ["all", 0]), context)["out"]
    torch.testing.assert_close(out["samples"], recorded()["out/basic_guider"], atol=1e-4, rtol=0)


def test_every_recorded_run_is_among_these() -> None:
    cases = json.loads(golden("comfyui/pipeline.json").read_text())["cases"]
    assert set(CASES) == set(cases) - {"custom_advanced_3_of_4", "basic_guider"}
