"""Lowering to Triton for a GPU, on a machine that has none."""
