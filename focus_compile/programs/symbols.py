"""Symbolic inputs for the programs' compiler."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from focus_compile.graph.inputs import Input
from focus_compile.graph.sizes import HINTS, Extent, Numbers, length
from focus_compile.torch_private import ConstantSource, DimDynamic, FakeTensorMode, ShapeEnv

__all__ = ["Symbols"]


class Symbols:
    """One backed symbol per name, each at least 2 to the compiler, in a fresh shape environment."""

    def __init__(self) -> None:
        self.shape_env = ShapeEnv(duck_shape=False)
        self.mode = FakeTensorMode(shape_env=self.shape_env, allow_non_fake_inputs=True)
        self.sizes: dict[str, torch.SymInt] = {}

    def tensors(self, inputs: Iterable[Input]) -> dict[str, torch.Tensor]:
        """Symbolic fake tensors by name."""
        return {given.name: self._tensor(given) for given in inputs}

    def _tensor(self, given: Input) -> torch.Tensor:
        for extent in given.shape:
            self._declare(extent)
        shape = [length(extent, self.sizes) for extent in given.shape]
        stride: list[Any] | None = None if given.stride is None else list(given.stride)
        if given.strided:
            stride = [1]
            for depth in range(len(shape) - 1):
                stride.insert(0, self._make(f"{given.name}_stride{depth}", 97 * 13**depth))
        with self.mode:
            if stride is not None:
                out = torch.empty_strided(shape, stride, dtype=given.dtype, device=given.device)
            else:
                out = torch.empty(shape, dtype=given.dtype, device=given.device)
            return torch.nn.Parameter(out, requires_grad=False) if given.parameter else out

    def _declare(self, extent: Extent) -> None:
        if isinstance(extent, str) and extent not in self.sizes:
            self.sizes[extent] = self._make(extent, Numbers(HINTS)[extent])
        elif isinstance(extent, tuple):
            for part in extent:
                self._declare(part)

    def _make(self, name: str, hint: int) -> torch.SymInt:
        source = ConstantSource(f"focus_{name}")
        symbol = self.shape_env.create_symbol(hint, source, dynamic_dim=DimDynamic.DYNAMIC)
        size = self.shape_env.create_symintnode(symbol, hint=hint, source=source)
        assert isinstance(size, torch.SymInt)
        return size
