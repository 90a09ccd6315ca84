"""What Inductor gets in place of operators that it lowers badly, or does not see into."""

from __future__ import annotations

import copy
import operator
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from focus_compile.graph.nodes import tensor_of
from focus_compile.ops.library import focus

__all__ = ["drop_unread", "lower"]

_MATRIX = 2
_JOIN = [argument.name for argument in focus.join.default._schema.arguments]


def lower(gm: GraphModule, *, captured: bool = False) -> GraphModule:
    """A copy of prefix or suffix with operators made for its device.

    CPU, fp32: ``linear`` -> ``focus::linear``. Inductor calls a matrix product that was tuned for
    many rows; ``focus::linear`` says why and by how much that is slower for the retained tokens.

    CUDA: ``focus::importance`` -> ``focus_fused::importance``; ``focus::signal``, ``retain`` and
    ``tables`` -> ``focus_fused::choose``, whose Triton kernels become part of the output code.
    ``focus::join`` and ``focus::attend`` keep their names, and get an implementation of their own
    (:mod:`focus_compile.ops.triton.layers`).

    ``captured``: the graph is to be recorded as a CUDA graph, in which ``focus::join`` cannot ask
    the host whether it may write into its slots: it never does.
    """
    graph = copy.deepcopy(gm.graph)
    for node in list(graph.nodes):
        if node.target is torch.ops.aten.linear.default and _fits(node):
            node.target = focus.linear.default
            node.args = (*node.args, None)[:3]
        elif node.target is focus.importance.default and _on_gpu(node):
            node.target = _fused().importance.default
        elif node.target is focus.retain.default and _on_gpu(node):
            _choose(graph, node)
        elif node.target is focus.join.default and captured:
            node.update_arg(_JOIN.index("reuse"), None)
    return GraphModule(gm, graph)


def drop_unread(gm: GraphModule, before: GraphModule) -> list[int]:
    """Take inputs away that are read in ``before`` and no longer; which are left, by position."""
    left = []
    pairs = zip(*(x.graph.find_nodes(op="placeholder") for x in (gm, before)), strict=True)
    for index, (node, old) in enumerate(pairs):
        if old.users and not node.users:
            gm.graph.erase_node(node)
        else:
            left.append(index)
    gm.recompile()
    return left


def _fits(node: Node) -> bool:
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    operands = [tensor_of(arg) for arg in node.args if isinstance(arg, Node)]
    alike = all(value.device.type == "cpu" and value.dtype == torch.float32 for value in operands)
    return alike and operands[1].dim() == _MATRIX and not node.kwargs


def _on_gpu(node: Node) -> bool:
    return tensor_of(node).device.type == "cuda"


def _fused() -> Any:
    """The fused operators, and what layers call; both need Triton, as every CUDA build has it."""
    import focus_compile.ops.triton.layers
    import focus_compile.ops.triton.operators  # noqa: F401

    return torch.ops.focus_fused


def _choose(graph: Graph, retain: Node) -> None:
    """``signal``, ``retain`` and ``tables``, as the ``retain`` pass wrote them, become one node."""
    signal = retain.args[0]
    (tables,) = (user for user in retain.users if user.target is focus.tables.default)
    assert isinstance(signal, Node) and signal.target is focus.signal.default
    with graph.inserting_before(retain):
        chosen = graph.call_function(_fused().choose.default, (*signal.args, *retain.args[1:]))
        delta, mask = (graph.call_function(operator.getitem, (chosen, n)) for n in range(2))
    for part in list(tables.users):
        part.args = (chosen, part.args[1] + 2)  # type: ignore[operator]
    retain.replace_all_uses_with(mask)
    signal.replace_all_uses_with(delta)
    for node in (tables, retain, signal):
        graph.erase_node(node)
