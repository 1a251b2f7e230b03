"""Pallas kernels, one file each. Each computes what a plain function of JAX defines, and is tested against it."""
