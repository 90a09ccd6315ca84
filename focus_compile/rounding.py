"""What rounding may do to a model's outputs, by the dtype that they are computed in."""

from __future__ import annotations

import torch

__all__ = ["TOLERANCE"]

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Largest difference of two runs that round differently, relative to the largest value or 1."""
