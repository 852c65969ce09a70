"""Prompt to picture; start reading at `generate`."""
