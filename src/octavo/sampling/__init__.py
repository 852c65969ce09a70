"""From noise to data, in sigma: schedules, samplers, guidance and seeded noise. Knows tensors, and no model.

Start reading at `flow` for the mathematics of a mixture, at `protocol` for what a sampler is. A whole run is

    spec = get_sampler("dpmpp_2m")
    sigmas = schedule("sgm_uniform", steps=28, shift=3.0, discard_penultimate=spec.discard_penultimate)
    x = flow.add_noise(latents, noise.initial_noise(latents.shape, seed), sigmas[0])
    x = sample(spec(x, sigmas, noise=noise.for_run(spec, x, sigmas, seed), shift=3.0), denoise)
"""

from octavo.sampling.flow import percent_to_sigma
from octavo.sampling.guidance import ClassifierFree, Guidance, Predictions, SkipLayerGuidance
from octavo.sampling.noise import initial_noise
from octavo.sampling.protocol import Guided, Noise, Sampler, SamplerSpec, sample
from octavo.sampling.samplers import SAMPLERS, get_sampler
from octavo.sampling.schedule import SCHEDULES, get_schedule, schedule

__all__ = [
    "SAMPLERS",
    "SCHEDULES",
    "ClassifierFree",
    "Guidance",
    "Guided",
    "Noise",
    "Predictions",
    "Sampler",
    "SamplerSpec",
    "SkipLayerGuidance",
    "get_sampler",
    "get_schedule",
    "initial_noise",
    "percent_to_sigma",
    "sample",
    "schedule",
]
