"""The programs of a captured graph: dense, prefix and suffix, each compiled when first needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._guards import TracingContext, tracing
from torch.fx import GraphModule

from focus_compile.axes import graph_inputs
from focus_compile.cut import Half
from focus_compile.replay import fake_mode_of

__all__ = ["Inner", "Program", "SpecializedSize"]

Inner = Callable[[GraphModule, Sequence[Any]], Callable[..., Any]]
"""The inner compiler: ``(graph, example inputs) -> callable``; Inductor's ``compile_fx`` or eager."""


class SpecializedSize(AssertionError):
    """A compiler turned a symbolic size into a constant: the program would serve one size only."""


@dataclass
class Program:
    """Prefix or suffix: called by name, compiled on the first call.

    Attributes:
        calls: how often it ran.
        compiled: the callable, or None before the first call.
    """

    half: Half
    inner: Inner
    calls: int = 0
    compiled: Callable[..., Any] | None = field(default=None, repr=False)

    def __call__(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run on inputs by name; outputs by name."""
        if self.compiled is None:
            self.compiled = self._compile()
        self.calls += 1
        outputs = self.compiled(*[values[name] for name in self.half.inputs])
        return dict(zip(self.half.outputs, outputs, strict=True))

    def _compile(self) -> Callable[..., Any]:
        gm = self.half.gm
        mode = fake_mode_of(gm)
        examples = [node.meta["val"] for node in graph_inputs(gm)]
        copy = GraphModule(gm, gm.graph)
        with tracing(TracingContext(mode)), torch.no_grad():
            compiled = self.inner(copy, examples)
        assert mode.shape_env is not None
        if mode.shape_env.replacements:
            raise SpecializedSize(f"sizes became constants: {mode.shape_env.replacements}")
        return compiled
