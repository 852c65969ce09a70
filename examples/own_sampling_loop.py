"""Samplers are generators: they ask (x, sigma) and are sent the model's estimate. Here the model is a formula."""

import torch

from octavo.sampling import SAMPLERS, schedule

# Data that are normal with mean 0 and deviation 0.5 have a known best estimate at every noise level.
sigmas = schedule("simple", 20, shift=3.0)
x = torch.randn(4, generator=torch.Generator().manual_seed(0))
start = x.clone()

sampler = SAMPLERS["dpmpp_2m"](x, sigmas)
x, sigma = next(sampler)
try:
    while True:
        denoised = x * 0.25 * (1 - sigma) / (0.25 * (1 - sigma) ** 2 + sigma**2)
        x, sigma = sampler.send(denoised)
except StopIteration as end:
    result = end.value
print("exact:", (0.5 * start).tolist())
print("here: ", result.tolist())
