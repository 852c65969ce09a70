"""What triton raises where it cannot compile or launch a kernel; its own errors, which are not RuntimeErrors."""

from triton.errors import TritonError

__all__ = ["TritonError"]
