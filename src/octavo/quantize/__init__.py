"""Which layers of a model keep their weights in FP8, and how."""

from octavo.quantize.convert import convert

__all__ = ["convert"]
