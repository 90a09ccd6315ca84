"""Which model a graph's arguments belong to, and with which weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.nn import Parameter

from focus_compile.shards import local

__all__ = ["model_key", "weights_of"]


def model_key(args: Sequence[Any]) -> tuple[int, ...]:
    """What tells one model from another: its parameters, among a graph's arguments."""
    return tuple(id(arg) for arg in args if isinstance(arg, Parameter))


def weights_of(args: Sequence[Any]) -> tuple[tuple[int, int], ...]:
    """What tells a model's weights from those it had before: their memory, and writes to it."""
    parts = [local(arg) for arg in args if isinstance(arg, Parameter)]
    return tuple((part.data_ptr(), 0 if part.is_inference() else part._version) for part in parts)
