"""Finding a sampler or schedule by the name that a user gives, in whatever spelling they know it.

Names are ComfyUI's. Case, spaces, hyphens and underscores do not matter and "++" is "pp", which covers most of what
other programs write ("DPM++ 2M SDE"); the rest is in the two tables.
"""

import re
from collections.abc import Mapping
from typing import TypeVar

from octavo.errors import RequestError, did_you_mean

Found = TypeVar("Found")

SAMPLER_ALIASES: Mapping[str, str] = {
    # AUTOMATIC1111 and its forks
    "Euler a": "euler_ancestral",
    "DPM2": "dpm_2",
    "DPM2 a": "dpm_2_ancestral",
    "DPM++ 2S a": "dpmpp_2s_ancestral",
    "DDIM CFG++": "euler_cfg_pp",
    # diffusers
    "FlowMatchEulerDiscreteScheduler": "euler",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
    "FlowMatchHeunDiscreteScheduler": "heun",
    "HeunDiscreteScheduler": "heun",
    "KDPM2DiscreteScheduler": "dpm_2",
    "KDPM2AncestralDiscreteScheduler": "dpm_2_ancestral",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "DPMSolverSDEScheduler": "dpmpp_sde",
    "LMSDiscreteScheduler": "lms",
    "UniPCMultistepScheduler": "uni_pc",
    "DEISMultistepScheduler": "deis",
    "SASolverScheduler": "sa_solver",
    "LCMScheduler": "lcm",
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
}

SCHEDULE_ALIASES: Mapping[str, str] = {
    "Uniform": "normal",  # AUTOMATIC1111
    "DDIM": "ddim_uniform",
    "FlowMatchEulerDiscreteScheduler": "normal",  # diffusers; the same levels
    "trailing": "sgm_uniform",
}


def normalise(name: str) -> str:
    """`name` without what spellings differ in: `"DPM++ 2M"` and `"dpmpp_2m"` both give `"dpmpp2m"`."""
    return re.sub(r"[^a-z0-9]", "", name.lower().replace("++", "pp"))


def look_up(kind: str, name: str, known: Mapping[str, Found], aliases: Mapping[str, str]) -> Found:
    """What `name` stands for.

    Args:
        kind: what is looked for, for the error's text.
        name: as the user gave it.
        known: what there is, by name.
        aliases: other spellings, and the names in `known` that they mean.

    Raises:
        RequestError: no such name; the text has the closest one, or all of them.
    """
    if name in known:
        return known[name]
    wanted = normalise(name)
    for spelling, target in [*((own, own) for own in known), *aliases.items()]:
        if normalise(spelling) == wanted:
            return known[target]
    hint = did_you_mean(name, known) or did_you_mean(name.lower(), aliases) or f" There are: {', '.join(known)}."
    raise RequestError(f"There is no {kind} '{name}'.{hint}")
