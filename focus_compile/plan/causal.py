"""Whether the mask of an attention site hides later tokens."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from focus_compile.axes.rules.table import ARANGES
from focus_compile.graph.nodes import aten, reachable, tensor_of
from focus_compile.plan.sites import Site

__all__ = ["is_causal"]

_MOVED = (
    aten.add.Tensor, aten.unsqueeze.default, aten.view.default, aten.reshape.default,
    aten.expand.default, aten.to.dtype, aten.slice.Tensor, aten.alias.default,
)  # fmt: skip
"""Operators that leave counted positions counted positions."""
_KEY_FIRST = (aten.le.Tensor, aten.lt.Tensor)
_QUERY_FIRST = (aten.ge.Tensor, aten.gt.Tensor)


def is_causal(gm: GraphModule, site: Site) -> bool:
    """Whether the mask of a site hides later tokens: ``is_causal``, or computed so in the graph."""
    if site.causal or site.mask is None:
        return site.causal
    (mask,) = (node for node in gm.graph.nodes if node.name == site.mask)
    return any(_hides_later(node) for node in reachable(mask, lambda node: node.all_input_nodes))


def _hides_later(node: Node) -> bool:
    """``key <= query`` (or ``<``) of positions ``[.., 1, K]`` and ``[.., T, 1]``; or ``tril``."""
    if node.target is aten.tril.default:
        return True
    if node.target not in (*_KEY_FIRST, *_QUERY_FIRST):
        return False
    key, query = node.args if node.target in _KEY_FIRST else node.args[::-1]
    if not (isinstance(key, Node) and isinstance(query, Node)):
        return False
    rows, columns = tensor_of(query).shape, tensor_of(key).shape
    apart = len(rows) > 1 and rows[-1] == 1 and tuple(columns[-2:-1]) in ((), (1,))
    return apart and _is_arange(key) and _is_arange(query)


def _is_arange(node: Node) -> bool:
    """Whether a value is an ``arange``, shifted or viewed."""
    while node.op == "call_function" and node.target in _MOVED:
        source = node.args[0]
        if not isinstance(source, Node):
            return False
        node = source
    return node.op == "call_function" and node.target in ARANGES
