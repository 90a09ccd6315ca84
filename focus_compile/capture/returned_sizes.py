"""Numbers that a model returns beside its tensors: sizes, such as how many tokens a cache holds.

With symbolic sizes Dynamo makes a counter that a model's cache keeps in Python an output of the
graph. It follows from the sizes of the inputs alone, so that no program need compute it: the graph
is analysed without it, and the runtime adds it to what the programs return.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.fx import GraphModule, Node

from focus_compile.graph.nodes import graph_inputs, graph_outputs

__all__ = ["ReturnedSize", "size_symbols", "with_sizes", "without_sizes"]


@dataclass(frozen=True)
class ReturnedSize:
    """An output by position, and how it follows from sizes of the graph's arguments.

    ``reads``: an argument by position and its dimension; None where the argument is a number.
    """

    output: int
    value: Callable[..., Any]
    reads: tuple[tuple[int, int | None], ...]

    def of(self, args: Sequence[Any]) -> int:
        """The number, for a call's arguments."""
        read = (args[at] if dim is None else args[at].shape[dim] for at, dim in self.reads)
        return int(self.value(*read))


def without_sizes(gm: GraphModule) -> tuple[GraphModule, tuple[ReturnedSize, ...]]:
    """A graph that returns None where ``gm``, Dynamo's, returns a size, and those sizes: as far as
    they are sums and products of the inputs' own. Without any it is ``gm``.
    """
    found = []
    where = size_symbols(gm)
    for index, node in enumerate(graph_outputs(gm)):
        size = node.meta.get("example_value") if isinstance(node, Node) else None
        expr: Any = size.node.expr if isinstance(size, torch.SymInt) else None
        if expr is not None and _is_polynomial(expr) and expr.free_symbols <= where.keys():
            symbols = sorted(expr.free_symbols, key=str)
            reads = tuple(where[symbol] for symbol in symbols)
            found.append(ReturnedSize(index, sympy.lambdify(symbols, expr), reads))
    if not found:
        return gm, ()
    made = GraphModule(gm, copy.deepcopy(gm.graph))
    returned = list(graph_outputs(made))
    for size in found:
        returned[size.output] = None
    made.graph.output_node().args = (tuple(returned),)
    made.graph.eliminate_dead_code()
    made.recompile()
    return made, tuple(found)


def with_sizes(
    returned: Sequence[Any], sizes: Sequence[ReturnedSize], args: Sequence[Any]
) -> tuple[Any, ...]:
    """What a graph without its sizes returned, with those of a call's arguments."""
    made = {size.output: size.of(args) for size in sizes}
    return tuple(made.get(index, value) for index, value in enumerate(returned))


def size_symbols(gm: GraphModule) -> Mapping[Any, tuple[int, int | None]]:
    """Where the symbols of sizes are found among the graph's inputs."""
    where: dict[Any, tuple[int, int | None]] = {}
    for at, node in enumerate(graph_inputs(gm)):
        value = node.meta.get("example_value")
        if isinstance(value, torch.SymInt) and value.node.expr.is_Symbol:
            where.setdefault(value.node.expr, (at, None))
        elif isinstance(value, torch.Tensor):
            for dim, size in enumerate(value.shape):
                if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                    where.setdefault(size.node.expr, (at, dim))
    return where


def _is_polynomial(expr: Any) -> bool:
    kinds = (sympy.Add, sympy.Mul, sympy.Integer, sympy.Symbol)
    return all(isinstance(part, kinds) for part in sympy.preorder_traversal(expr))
