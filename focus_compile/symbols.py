"""Fresh size symbols and fake tensors for the inputs that a graph is given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from focus_compile.replay import fake_mode_of

__all__ = ["HINTS", "Symbols"]

HINTS = {
    "batch": 13,
    "token": 29,
    "history": 257,
    "fed": 211,
    "fed_row": 23,
    "retained": 89,
    "retained_row": 11,
}
"""Size hints on the generic side: pairwise distinct, none of them 0, 1 or a usual model size."""


class Symbols:
    """Fresh backed symbols, each at least 2 to the compiler, in one shape environment."""

    def __init__(self, fake_mode: FakeTensorMode) -> None:
        assert fake_mode.shape_env is not None
        self.fake_mode = fake_mode
        self.shape_env: ShapeEnv = fake_mode.shape_env

    @classmethod
    def new(cls) -> Symbols:
        """Symbols in a shape environment of their own."""
        env = ShapeEnv(duck_shape=False)
        return cls(FakeTensorMode(shape_env=env, allow_non_fake_inputs=True))

    @classmethod
    def of(cls, gm: GraphModule) -> Symbols:
        """Symbols in the shape environment of a graph."""
        return cls(fake_mode_of(gm))

    def make(self, name: str, hint: int) -> torch.SymInt:
        source = ConstantSource(f"focus_{name}")
        symbol = self.shape_env.create_symbol(hint, source, dynamic_dim=DimDynamic.DYNAMIC)
        size = self.shape_env.create_symintnode(symbol, hint=hint, source=source)
        assert isinstance(size, torch.SymInt)
        return size

    def tensor(
        self, shape: Sequence[Any], dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """A contiguous fake tensor."""
        with self.fake_mode:
            return torch.empty(shape, dtype=dtype, device=device)

    def strided(self, like: torch.Tensor, name: str) -> torch.Tensor:
        """A fake tensor of the shape of ``like``, contiguous in its last dim, free strides else."""
        strides: list[Any] = [1]
        for depth in range(like.dim() - 1):
            strides.insert(0, self.make(f"{name}_stride{depth}", 97 * 13**depth))
        with self.fake_mode:
            return torch.empty_strided(like.shape, strides, dtype=like.dtype, device=like.device)
