"""Operators that say the same in other words -> the words that the analysis knows.

x.type_as(y), x.to(y)       ->  x.to(dtype)           of y nothing but dtype and device is read
x.narrow(dim, a, n)         ->  x[..., a : a + n]
"""

from __future__ import annotations

from torch.fx import GraphModule, Node

from focus_compile.capture.edits import Edit
from focus_compile.graph.nodes import aten, expr_of, tensor_of

__all__ = ["say_plainly"]


def say_plainly(gm: GraphModule) -> None:
    """Rewrite a graph in place."""
    for node in list(gm.graph.nodes):
        if node.target in (aten.type_as.default, aten.to.other):
            _replace(node, _cast(node, Edit(gm, node)))
        elif node.target is aten.narrow.default:
            start = node.args[2]
            if not expr_of(start.meta["val"] if isinstance(start, Node) else start).is_negative:
                _replace(node, _slice(node, Edit(gm, node)))


def _replace(node: Node, by: Node) -> None:
    node.replace_all_uses_with(by)
    node.graph.erase_node(node)


def _cast(node: Node, edit: Edit) -> Node:
    x, value = node.args[0], tensor_of(node)
    if tensor_of(x).device == value.device:  # type: ignore[arg-type]
        return edit.call(aten.to.dtype, x, value.dtype)
    return edit.call(aten.to.device, x, value.device, value.dtype)


def _slice(node: Node, edit: Edit) -> Node:
    x, dim, start, length = node.args
    return edit.call(aten.slice.Tensor, x, dim, start, edit.total(start, length))  # type: ignore
