"""Modes of PyTorch that FOCUS leaves alone; each thread has its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

__all__ = ["refused_mode"]


def refused_mode(values: Sequence[Any]) -> str | None:
    """Why a call with these arguments is compiled unchanged, and what to do; None if it is not."""
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    if torch.is_grad_enabled() and any(value.requires_grad for value in tensors):
        return "gradients are enabled: call the model under torch.no_grad()"
    if any(torch.is_autocast_enabled(kind) for kind in {value.device.type for value in tensors}):
        return "autocast is enabled: give the model its dtype with model.to(...) instead"
    return None
