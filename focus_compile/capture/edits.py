"""Calls that are put into a captured graph where it stands, each with its value."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from focus_compile.graph.nodes import aten, expr_of, fake_mode_of, tensor_of
from focus_compile.torch_private import symbolic_mode

__all__ = ["Edit"]


class Edit:
    """Calls before one node of a graph; their provenance is the node's."""

    def __init__(self, gm: GraphModule, node: Node) -> None:
        self.graph, self.node, self.fake_mode = gm.graph, node, fake_mode_of(gm)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """``target(*args)``, whose value is computed from those of its arguments."""
        values = map_arg((args, kwargs), lambda arg: arg.meta["val"])
        with symbolic_mode(self.fake_mode), torch.no_grad():
            value = target(*values[0], **values[1])
        with self.graph.inserting_before(self.node):
            made = self.graph.call_function(target, args, kwargs)
        made.meta = dict(self.node.meta) | {"val": value}
        return made

    def again(self, view: Node, source: Node) -> Node:
        """A node's call once more, of another first operand."""
        return self.call(view.target, source, *view.args[1:], **view.kwargs)

    def size(self, x: Node, dim: int) -> Node | int:
        expr = expr_of(tensor_of(x).shape[dim])
        return int(expr) if expr.is_Integer else self.call(aten.sym_size.int, x, dim)

    def sizes(self, x: Node) -> list[Node | int]:
        return [self.size(x, dim) for dim in range(tensor_of(x).dim())]

    def total(self, left: Node | int, right: Node | int) -> Node | int:
        if isinstance(left, int) and isinstance(right, int):
            return left + right
        return self.call(operator.add, left, right)

    def squeezed(self, x: Node, dims: list[int]) -> Node:
        """Without some of its dims, which have one element."""
        for dim in sorted(dims, reverse=True):
            x = self.call(aten.squeeze.dim, x, dim)
        return x

    def fitted(self, x: Node, sizes: list[Node | int]) -> Node:
        """Broadcast to ``sizes``."""
        while tensor_of(x).dim() < len(sizes):
            x = self.call(aten.unsqueeze.default, x, 0)
        known = [size if isinstance(size, int) else expr_of(size.meta["val"]) for size in sizes]
        if [expr_of(size) for size in tensor_of(x).shape] == known:
            return x
        return self.call(aten.expand.default, x, sizes)
