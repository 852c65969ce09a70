"""Stable Diffusion 3.5 in 8 bits."""
