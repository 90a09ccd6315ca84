"""Modes of PyTorch that FOCUS leaves alone; each thread has its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from focus_compile.errors import Unsupported
from focus_compile.refusals import AUTOCAST, GRADIENTS

__all__ = ["refuse_modes"]


def refuse_modes(values: Sequence[Any]) -> None:
    """Look at the modes of this thread, for a call with these arguments.

    Raises:
        Unsupported: gradients or autocast are enabled.
    """
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    if torch.is_grad_enabled() and any(value.requires_grad for value in tensors):
        raise Unsupported(GRADIENTS)
    if any(
        torch.is_autocast_enabled(device) for device in {value.device.type for value in tensors}
    ):
        raise Unsupported(AUTOCAST)
