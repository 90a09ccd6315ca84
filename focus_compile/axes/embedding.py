"""Where token ids enter a graph: the embedding, and the input that it looks up."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from focus_compile.axes.axes import Entry
from focus_compile.axes.rules.table import EMBEDDINGS
from focus_compile.graph.nodes import aten, operands, tensor_of

__all__ = ["find_entry"]


def _producer(node: Node) -> Node:
    """The input that ``node`` is a copy or cast of."""
    while node.op == "call_function" and node.target in (
        aten.to.dtype, aten._to_copy.default, aten.alias.default, aten.clone.default,
    ):  # fmt: skip
        node = operands(node)[0]
    return node


def find_entry(gm: GraphModule) -> Entry | None:
    """Where a graph's token ids enter; None if it embeds no input."""
    lookups: dict[Node, Node] = {}
    for node in gm.graph.nodes:
        if node.op == "call_function" and node.target in EMBEDDINGS:
            ids = _producer(operands(node)[1])
            if ids.op == "placeholder" and tensor_of(ids).dim() in (1, 2):
                lookups.setdefault(ids, node)
    return next((Entry(node, ids, len(lookups) == 1) for ids, node in lookups.items()), None)
