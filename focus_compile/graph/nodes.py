"""Nodes of an ATen graph: their values, operands and sizes, and how data flows between them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import networkx as nx
import sympy
import torch
from torch.fx import GraphModule, Node

from focus_compile.errors import Unsupported
from focus_compile.refusals import NO_TENSOR
from focus_compile.torch_private import FakeTensor, FakeTensorMode, FloorDiv

__all__ = [
    "Size",
    "argument",
    "aten",
    "cat_parts",
    "data_flow",
    "expr_of",
    "fake_mode_of",
    "graph_inputs",
    "graph_outputs",
    "is_count",
    "operands",
    "reachable",
    "tensor_of",
    "wrap",
]

aten = torch.ops.aten
Size = int | torch.SymInt


def fake_mode_of(gm: GraphModule) -> FakeTensorMode:
    """The fake mode that a graph's values belong to."""
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, FakeTensor):
            return value.fake_mode
    raise ValueError("the graph holds no fake tensor")


def expr_of(size: Size) -> sympy.Expr:
    """A size as a sympy expression; divisions that leave no rest are carried out.

    Where two sizes share a symbol, torch keeps ``s * s // s`` as it is.
    """
    if not isinstance(size, torch.SymInt):
        return sympy.Integer(size)
    expr: sympy.Expr = size.node.expr
    return expr.replace(FloorDiv, _divided) if expr.has(FloorDiv) else expr


def _divided(dividend: sympy.Expr, divisor: sympy.Expr) -> sympy.Expr:
    quotient = sympy.cancel(dividend / divisor)
    return quotient if is_count(quotient) else FloorDiv(dividend, divisor)


def tensor_of(node: Node) -> torch.Tensor:
    """The fake tensor that ``node`` computes."""
    value = node.meta["val"]
    if not isinstance(value, torch.Tensor):
        raise Unsupported(NO_TENSOR, node)
    return value


def is_count(value: sympy.Expr) -> bool:
    """Whether an expression is a whole number for all values of its symbols."""
    return bool(sympy.denom(sympy.together(value)) == 1)


def graph_outputs(gm: GraphModule) -> Any:
    """What a graph returns: nodes, nested in tuples."""
    return gm.graph.output_node().args[0]


def graph_inputs(gm: GraphModule) -> list[Node]:
    """Placeholders of a graph, in order."""
    return [node for node in gm.graph.nodes if node.op == "placeholder"]


def operands(node: Node) -> list[Node]:
    """Tensor operands of a node, in order of appearance."""
    return [arg for arg in node.all_input_nodes if isinstance(arg.meta.get("val"), torch.Tensor)]


def argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    """An argument given by position or by keyword."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def wrap(dim: int, rank: int) -> int:
    return dim % rank if rank else 0


def cat_parts(node: Node) -> list[Node]:
    """Operands of a ``cat`` without the empty 1-D tensors that it skips."""
    parts: list[Node] = list(node.args[0])  # type: ignore[arg-type]
    rank = tensor_of(node).dim()
    return [part for part in parts if tensor_of(part).dim() == rank]


def data_flow(gm: GraphModule) -> nx.DiGraph:
    """The data-flow graph, on nodes."""
    graph: nx.DiGraph = nx.DiGraph()
    graph.add_nodes_from(gm.graph.nodes)
    graph.add_edges_from(
        (source, node) for node in gm.graph.nodes for source in node.all_input_nodes
    )
    return graph


def reachable(start: Node, neighbours: Callable[[Node], Iterable[Node]]) -> set[Node]:
    """A node, and all that can be reached from it."""
    visited, queue = {start}, [start]
    while queue:
        unvisited = [node for node in neighbours(queue.pop()) if node not in visited]
        visited.update(unvisited)
        queue += unvisited
    return visited
