"""AUTOMATIC1111's "hires fix": `enable_hr` and the fields beside it, in its names and in ours.

What a field leaves unsaid is as in the first pass, as in A1111. Where latents or pixels are enlarged otherwise than
here, such as by upscaling models, the name is refused. What is left out of `hr_upscaler` and `denoising_strength` is
Octavo's own default, as of all fields.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from octavo.server.a1111_fields import SAMPLER_NAMES, SCHEDULE_LABELS, TextToImage, sampler_of, unknown

if TYPE_CHECKING:
    from octavo.checkpoint.presets import Preset
    from octavo.pipeline.hires import Hires

# A1111 enlarges by Lanczos where it says None.
UPSCALERS: Mapping[str, str] = {"None": "lanczos", "Lanczos": "lanczos", "Nearest": "nearest-exact"}
# Antialiasing is about what is made smaller, which nothing is here. A1111 has two modes more: Latent (nearest), which
# rounds places down, and Latent (bicubic antialiased), which is another cubic.
LATENT_MODES: Mapping[str, str] = {
    "Latent": "latent-bilinear",
    "Latent (antialiased)": "latent-bilinear",
    "Latent (bicubic)": "latent-bicubic",
    "Latent (nearest-exact)": "latent-nearest-exact",
    "Latent (bislerp)": "latent-bislerp",
}
SAME_SCHEDULER = ("", "use same scheduler")


def hires_of(body: TextToImage, preset: "Preset") -> "Hires | None":
    """The second pass; None where none is asked for. Needs torch imported.

    Raises:
        Refused: 422; another model, or a way to enlarge that is not done here.
        RequestError: a value out of range, or no such sampler or schedule.
    """
    if not body.enable_hr:
        return None
    from octavo.pipeline.hires import Hires

    if (body.hr_checkpoint_name or "").strip().lower() not in ("", "none", "use same checkpoint"):
        raise unknown(
            "hr_checkpoint_name", "hr_checkpoint_name: both passes are drawn by the same model; leave it out."
        )
    if [each for each in body.hr_additional_modules or [] if each.strip().lower() not in ("", "use same choices")]:
        raise unknown(
            "hr_additional_modules",
            "hr_additional_modules: both passes have the same encoders and VAE; leave it out.",
        )
    sampler, schedule = sampler_of(body.hr_sampler_name, body.hr_scheduler)
    if schedule is None and (body.hr_scheduler or "").strip().lower() not in SAME_SCHEDULER:
        schedule = preset.schedule  # automatic: what suits the model, whatever the first pass has
    asked: dict[str, Any] = {
        "width": body.hr_resize_x or None,
        "height": body.hr_resize_y or None,
        "method": _method_of(body.hr_upscaler),
        "denoise": body.denoising_strength,
        "steps": body.hr_second_pass_steps or None,
        "guidance_scale": body.hr_cfg,
        "sampler": sampler,
        "schedule": schedule,
        "prompt": body.hr_prompt.strip() or None,
        "negative_prompt": body.hr_negative_prompt.strip() or None,
    }
    if not (body.hr_resize_x or body.hr_resize_y):
        asked["scale"] = body.hr_scale
    return Hires(**{name: value for name, value in asked.items() if value is not None})


def _method_of(name: str | None) -> str | None:
    """Ours of a way to enlarge; None where none is named."""
    from octavo.pipeline.hires import METHODS

    if name is None or not name.strip():
        return None
    known = {label.lower(): own for label, own in {**UPSCALERS, **LATENT_MODES}.items()} | {own: own for own in METHODS}
    method = known.get(name.strip().lower())
    if method is None:
        raise unknown(
            "hr_upscaler",
            f"hr_upscaler '{name[:60]}' is not done by Octavo, which reads no upscaling models; use "
            f"{', '.join((*UPSCALERS, *LATENT_MODES))}.",
        )
    return method


def told(hires: Mapping[str, Any]) -> dict[str, Any]:
    """What `info` says of a second pass, by A1111's names.

    Args:
        hires: of the settings of a picture; may be empty.
    """
    if not hires:
        return {}
    labels = {own: label for label, own in reversed([*UPSCALERS.items(), *LATENT_MODES.items()]) if label != "None"}
    sampler, schedule = str(hires.get("sampler")), str(hires.get("schedule"))
    pairs = {
        "Hires resize": f"{hires['width']}x{hires['height']}",
        "Hires steps": hires.get("steps"),
        "Hires upscaler": labels.get(hires["method"], hires["method"]),
        "Hires CFG Scale": hires.get("guidance_scale"),
        "Hires sampler": hires.get("sampler") and SAMPLER_NAMES.get(sampler, sampler),
        "Hires schedule type": hires.get("schedule") and SCHEDULE_LABELS.get(schedule, schedule),
        "Hires prompt": hires.get("prompt"),
        "Hires negative prompt": hires.get("negative_prompt"),
    }
    return {name: value for name, value in pairs.items() if value is not None}
