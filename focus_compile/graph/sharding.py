"""Tensor parallelism as a graph shows it: groups of ranks, and values that are one rank's part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor

__all__ = ["Group", "collectives", "is_sharded", "local"]

collectives = torch.ops._c10d_functional


@dataclass(frozen=True)
class Group:
    """The processes that share a model: how many, and their group's name."""

    ranks: int
    name: str


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether processes share a model's weights out."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def local(value: Any) -> Any:
    """A DTensor's local tensor; any other value as it is."""
    return value.to_local() if isinstance(value, DTensor) else value
