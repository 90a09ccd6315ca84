"""What Inductor gets in place of an operator that it lowers badly for few rows."""

from __future__ import annotations

import copy

import torch
from torch.fx import GraphModule, Node

from focus_compile.axes import tensor_of
from focus_compile.ops import focus

__all__ = ["lower"]

_MATRIX = 2


def lower(gm: GraphModule) -> GraphModule:
    """A copy of prefix or suffix with ``focus::linear`` for fp32 products on a CPU.

    Inductor calls a matrix product that was tuned for many rows; ``focus::linear`` says why and
    by how much that is slower for the rows of the retained tokens.
    """
    graph = copy.deepcopy(gm.graph)
    if torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        for node in graph.nodes:
            if node.target is torch.ops.aten.linear.default and _fits(node):
                node.target = focus.linear.default
                node.args = (*node.args, None)[:3]
    return GraphModule(gm, graph)


def _fits(node: Node) -> bool:
    operands = [tensor_of(arg) for arg in node.args if isinstance(arg, Node)]
    alike = all(value.device.type == "cpu" and value.dtype == torch.float32 for value in operands)
    return alike and operands[1].dim() == _MATRIX and not node.kwargs
