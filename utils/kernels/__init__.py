"""Triton kernels and their definitions in plain torch; they know tensors, not this project."""
