"""Triton kernels, each naming the plain definition that it is proven against; the only room that imports triton."""
