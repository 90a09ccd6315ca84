"""Where token ids enter a graph: the embedding, and the input that it looks up."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from focus_compile.axes.rules.table import EMBEDDINGS
from focus_compile.graph.nodes import aten, operands, tensor_of

__all__ = ["embedded_inputs", "token_ids"]


def _producers(node: Node) -> Node:
    """The input that ``node`` is a copy or cast of."""
    while node.op == "call_function" and node.target in (
        aten.to.dtype, aten._to_copy.default, aten.alias.default, aten.clone.default,
    ):  # fmt: skip
        node = operands(node)[0]
    return node


def token_ids(gm: GraphModule) -> tuple[Node, Node] | None:
    """The (embedding node, graph input of token ids) of a graph; None if it embeds no input."""
    found = embedded_inputs(gm)
    return next(((node, ids) for ids, node in found.items()), None)


def embedded_inputs(gm: GraphModule) -> dict[Node, Node]:
    """Graph inputs that index an embedding, each with the first embedding that it indexes."""
    found: dict[Node, Node] = {}
    for node in gm.graph.nodes:
        if node.op == "call_function" and node.target in EMBEDDINGS:
            ids = _producers(operands(node)[1])
            if ids.op == "placeholder" and tensor_of(ids).dim() in (1, 2):
                found.setdefault(ids, node)
    return found
