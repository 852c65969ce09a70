"""What AUTOMATIC1111's clients send, field by field: what it means for us, and what is refused.

A field that Octavo honours becomes a part of the `GenerateRequest`. A field that it does not is let through only with
the value that changes nothing; anything else is 422 with the field's name, never ignored.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from octavo.errors import RequestError
from octavo.server.a1111_control import is_control
from octavo.server.problems import Refused

NOTHING = (None, "", "None", 0, False)
OTHER_NETWORKS = re.compile(r"<(hypernet|lyco):", re.IGNORECASE)  # <lora:…> is known to the pipeline
AUTOMATIC = ("", "automatic", "use same sampler", "use same scheduler", "none")
# How A1111 writes the samplers that it shares with us; the others go by our names.
SAMPLER_NAMES: Mapping[str, str] = {
    "euler": "Euler", "euler_ancestral": "Euler a", "heun": "Heun", "lms": "LMS", "dpm_2": "DPM2",
    "dpm_2_ancestral": "DPM2 a", "dpmpp_2s_ancestral": "DPM++ 2S a", "dpmpp_2m": "DPM++ 2M", "dpmpp_sde": "DPM++ SDE",
    "dpmpp_2m_sde": "DPM++ 2M SDE", "dpmpp_2m_sde_heun": "DPM++ 2M SDE Heun", "dpmpp_3m_sde": "DPM++ 3M SDE",
    "dpm_fast": "DPM fast", "dpm_adaptive": "DPM adaptive", "ddim": "DDIM", "uni_pc": "UniPC", "lcm": "LCM",
}  # fmt: skip
SCHEDULE_LABELS: Mapping[str, str] = {
    "normal": "Normal", "karras": "Karras", "exponential": "Exponential", "sgm_uniform": "SGM Uniform",
    "kl_optimal": "KL Optimal", "simple": "Simple", "ddim_uniform": "DDIM", "beta": "Beta",
}  # fmt: skip


class Drawing(BaseModel):
    """What txt2img and img2img have in common. Left out, a setting is what suits the model."""

    model_config = ConfigDict(extra="forbid")

    prompt: str = ""
    negative_prompt: str = ""
    seed: int = Field(-1, ge=-1, lt=2**64, description="-1 draws one")
    steps: int | None = Field(None, ge=1, le=1000)
    cfg_scale: float | None = Field(None, ge=0, le=100)
    width: int | None = Field(None, ge=16, le=16384)
    height: int | None = Field(None, ge=16, le=16384)
    sampler_name: str | None = None
    sampler_index: str | None = Field(None, description="older name of sampler_name, which goes first")
    scheduler: str | None = None
    batch_size: int = Field(1, ge=1, le=64)
    n_iter: int = Field(1, ge=1, le=64, description="batches; in all batch_size x n_iter pictures")
    override_settings: dict[str, Any] = Field(default_factory=dict, description="as /sdapi/v1/options, for this once")
    override_settings_restore_afterwards: bool = True
    send_images: bool = True
    save_images: bool = Field(False, description="pictures are kept in any case: accepted work is never lost")

    # Let through with the value that changes nothing
    subseed: int = Field(-1, description="only with subseed_strength, which must be 0")
    subseed_strength: float = 0
    seed_resize_from_h: int = -1
    seed_resize_from_w: int = -1
    styles: list[str] | None = None
    restore_faces: bool | None = None
    tiling: bool | None = None
    do_not_save_samples: bool = False
    do_not_save_grid: bool = Field(False, description="there are no grids")
    eta: float | None = None
    s_min_uncond: float | None = None
    s_churn: float | None = None
    s_tmax: float | None = None
    s_tmin: float | None = None
    s_noise: float | None = None
    refiner_checkpoint: str | None = None
    refiner_switch_at: float | None = None
    disable_extra_networks: bool = False
    firstpass_image: str | None = None
    comments: dict[str, Any] | None = None
    script_name: str | None = None
    script_args: list[Any] = Field(default_factory=list, description="only with script_name, which must be empty")
    alwayson_scripts: dict[str, Any] = Field(default_factory=dict)
    force_task_id: str | None = None
    infotext: str | None = None


class TextToImage(Drawing):
    """POST /sdapi/v1/txt2img"""

    enable_hr: bool = Field(False, description="draw it again, larger; see `a1111_hires`")
    # Of no account while enable_hr is off
    denoising_strength: float | None = None
    firstphase_width: int = Field(0, description="must be 0: the first pass is drawn at width and height")
    firstphase_height: int = 0
    hr_scale: float = 2.0
    hr_upscaler: str | None = Field(None, description="as /sdapi/v1/upscalers and latent-upscale-modes name them")
    hr_second_pass_steps: int = Field(0, description="0 for as many as the first pass has")
    hr_resize_x: int = Field(0, description="goes before hr_scale; 0 follows from the other side")
    hr_resize_y: int = 0
    hr_checkpoint_name: str | None = Field(None, description="must be the same")
    hr_sampler_name: str | None = None
    hr_scheduler: str | None = None
    hr_prompt: str = Field("", description="of the second pass; empty for the same")
    hr_negative_prompt: str = ""
    hr_additional_modules: list[str] | None = Field(None, description="must be the same")
    hr_cfg: float | None = None


class ImageToImage(Drawing):
    """POST /sdapi/v1/img2img"""

    init_images: list[str] = Field(default_factory=list, max_length=1, description="one picture in base64")
    resize_mode: int = Field(0, ge=0, le=2, description="0 stretches, 1 cuts, 2 widens the edges")
    denoising_strength: float = Field(0.75, ge=0, le=1)
    mask: str | None = Field(None, description="white, or opaque, is drawn anew")
    mask_blur: int | None = Field(None, ge=0, le=256)
    mask_blur_x: int | None = None
    mask_blur_y: int | None = None
    mask_round: bool = True
    inpainting_fill: int = Field(0, description="0 hides what is masked, 1 leaves it")
    inpaint_full_res: bool | int = True
    inpaint_full_res_padding: int = Field(0, ge=0, le=4096)
    inpainting_mask_invert: int = Field(0, ge=0, le=1)
    include_init_images: bool = False
    # Let through with the value that changes nothing
    image_cfg_scale: float | None = Field(None, description="of models that read pictures, which SD3 is not")
    initial_noise_multiplier: float | None = None
    latent_mask: str | None = None


def _empty(value: Any) -> bool:
    return value in NOTHING or value in ([], {})


def _quiet_scripts(scripts: Any) -> bool:
    """Scripts that are named but switched off; ControlNet is read by `a1111_control`."""
    return all(
        isinstance(each, dict) and (not each.get("args") or each["args"] in ([False], [None]))
        for name, each in scripts.items()
        if not is_control(name)
    )


# By field, whether a value changes nothing.
NEUTRAL: Mapping[str, Callable[[Any], bool]] = {
    "subseed_strength": _empty, "styles": _empty, "restore_faces": _empty, "tiling": _empty,
    "seed_resize_from_h": lambda value: value <= 0, "seed_resize_from_w": lambda value: value <= 0,
    "firstphase_width": _empty, "firstphase_height": _empty, "firstpass_image": _empty,
    "eta": lambda value: value in (None, 1), "s_min_uncond": _empty, "s_churn": _empty, "s_tmin": _empty,
    "s_tmax": lambda value: value in (None, 0) or value == float("inf"), "s_noise": lambda value: value in (None, 1),
    "refiner_checkpoint": _empty, "refiner_switch_at": lambda value: value in (None, 0, 1), "script_name": _empty,
    "alwayson_scripts": _quiet_scripts, "force_task_id": _empty, "infotext": _empty, "latent_mask": _empty,
    "initial_noise_multiplier": lambda value: value in (None, 1), "mask_blur_x": _empty, "mask_blur_y": _empty,
    "disable_extra_networks": _empty, "do_not_save_samples": _empty,
    "mask_round": bool, "inpainting_fill": lambda value: value in (0, 1),
}  # fmt: skip


def check_neutral(body: Drawing) -> None:
    """Refuse what is not honoured.

    Raises:
        Refused: 422, with the field's name.
    """
    for name, changes_nothing in NEUTRAL.items():
        value = getattr(body, name, None)
        if name in type(body).model_fields and not changes_nothing(value):
            raise unknown(name, f"{name} {value!r:.60} is not done by Octavo; leave it out.")
    for name in ("prompt", "negative_prompt", "hr_prompt", "hr_negative_prompt"):
        if found := OTHER_NETWORKS.search(getattr(body, name, "")):
            raise unknown(name, f"{name}: Octavo reads <lora:name:strength>, but no {found[0]}…>.")


def unknown(field: str, text: str) -> Refused:
    """422 for a field that is not honoured."""
    return Refused(text, status=422, kind="not_supported", param=field)


def wishes_of(body: Drawing, options: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that `GenerateRequest` knows, under its names; None where nothing is asked. Needs torch imported.

    Raises:
        RequestError: no such sampler or schedule.
    """
    sampler, schedule = sampler_of(body.sampler_name or body.sampler_index or None, body.scheduler)
    return {
        "prompt": body.prompt,
        "negative_prompt": body.negative_prompt or None,
        "width": body.width,
        "height": body.height,
        "steps": body.steps,
        "guidance_scale": body.cfg_scale,
        "sampler": sampler,
        "schedule": schedule,
        "seed": None if body.seed == -1 else body.seed,
        "batch": body.batch_size * body.n_iter,
        "clip_skip": options.get("clip_skip"),
        "speed": options.get("speed"),
    }


def sampler_of(name: str | None, scheduler: str | None) -> tuple[str | None, str | None]:
    """Our names of a sampler and a schedule; older clients write both in one, as "DPM++ 2M Karras".

    Raises:
        RequestError: no such sampler or schedule.
    """
    from octavo.sampling import get_sampler, get_schedule

    schedule = None
    if scheduler is not None and scheduler.strip().lower() not in AUTOMATIC:
        schedule = get_schedule(scheduler).__name__
    if name is None or name.strip().lower() in AUTOMATIC:
        return None, schedule
    try:
        return get_sampler(name).name, schedule
    except RequestError:
        for label, known in [*((label, own) for own, label in SCHEDULE_LABELS.items()), ("Uniform", "normal")]:
            if name.lower().endswith(" " + label.lower()):
                return get_sampler(name[: -len(label) - 1]).name, schedule or known
        raise
