"""The Triton kernels of importance and selection, on a machine without a GPU."""
