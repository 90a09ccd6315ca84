"""Inputs of the programs: their sizes by name, and fake tensors for them.

The passes run under fake tensors of *static* sizes, one generic number per name, which is many
times faster than symbolic ones. No pass reads a size off these numbers: sizes travel as nodes. The
compiler gets symbols in their place, one per name, in a fresh shape environment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from focus_compile.graph.sizes import Extent, generic
from focus_compile.torch_private import FakeTensorMode

__all__ = ["Argument", "Input", "Part", "static_tensor"]

Part = tuple[tuple[int, int], ...]
"""One element of a dim, and of a dim of what is left, ...: dims and elements."""


@dataclass(frozen=True)
class Argument:
    """An argument of Dynamo's graph, by position, or a part of one."""

    position: int
    part: Part = ()

    def of(self, args: Sequence[Any]) -> Any:
        """It, among a call's arguments: a view where it is a part."""
        value = args[self.position]
        for dim, element in self.part:
            value = value.select(dim, element)
        return value


@dataclass(frozen=True)
class Input:
    """One input of a program.

    Attributes:
        shape: its extents.
        stride: its strides where all extents are numbers; None: contiguous, or, where
            ``strided``, contiguous in the last dim only.
        parameter: whether it is a weight.
        held: of keys and values: whether the memory behind a history is that of the block; of
            slots: whether they are that history and block, so that nothing is copied.
    """

    name: str
    shape: tuple[Extent, ...]
    dtype: torch.dtype
    device: torch.device
    stride: tuple[int, ...] | None = None
    strided: bool = False
    parameter: bool = False
    held: bool = False

    @property
    def symbolic(self) -> bool:
        return not all(isinstance(extent, int) for extent in self.shape)


def static_tensor(mode: FakeTensorMode, spec: Input) -> torch.Tensor:
    """The fake tensor that the passes see: every name at its generic number."""
    with mode:
        shape = [generic(extent) for extent in spec.shape]
        if spec.stride is not None:
            return torch.empty_strided(shape, spec.stride, dtype=spec.dtype, device=spec.device)
        return torch.empty(shape, dtype=spec.dtype, device=spec.device)
