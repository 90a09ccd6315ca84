"""Attention masks that a model computes itself, from a 2-D one or from none.

transformers' models make *causal* ones, under which a token does not see those on its right. A
diffusion LLM must: its calls bring a mask ``[B, 1, T, S + T]`` of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch.fx import GraphModule, Node

from focus_compile.axes import tensor_of
from focus_compile.rules import ARANGES, EMBEDDINGS, aten
from focus_compile.sites import Site

__all__ = ["is_causal", "makes_mask"]

_SOFTMAXES = (aten.softmax.int, aten._softmax.default)
_SDPA = aten.scaled_dot_product_attention.default
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
    return any(_hides_later(node) for node in _reached(mask, lambda node: node.all_input_nodes))


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
    return apart and _counted(key) and _counted(query)


def _counted(node: Node) -> bool:
    """Whether a value is an ``arange``, shifted or viewed."""
    while node.op == "call_function" and node.target in _MOVED:
        source = node.args[0]
        if not isinstance(source, Node):
            return False
        node = source
    return node.op == "call_function" and node.target in ARANGES


def makes_mask(node: Node) -> bool:
    """Whether a value is computed beside the tokens, for the mask of attention alone."""
    tokens: set[Node] = set()
    for other in node.graph.nodes:
        if other.op == "call_function" and other.target in EMBEDDINGS:
            tokens |= _reached(other, lambda value: value.users)
    beside = _reached(node, lambda value: value.users) - tokens
    if node in tokens:
        return False
    met = {user for value in beside for user in value.users if user in tokens}
    return bool(met) and all(_masks(user, beside, tokens) for user in met)


def _masks(user: Node, beside: set[Node], tokens: set[Node]) -> bool:
    """Whether a value ``beside`` the tokens is the mask of ``user``, or added to its scores."""
    if user.target is _SDPA:
        operands = [arg for arg in user.all_input_nodes if arg in beside]
        return operands == [user.args[3] if len(user.args) > 3 else user.kwargs.get("attn_mask")]
    after = [user, *user.users]
    after += [other for node in user.users for other in node.users]
    return any(node.target in _SOFTMAXES for node in after)


def _reached(start: Node, further: Callable[[Node], Iterable[Node]]) -> set[Node]:
    """A node, and all that can be reached from it."""
    found, todo = {start}, [start]
    while todo:
        new = [node for node in further(todo.pop()) if node not in found]
        found.update(new)
        todo += new
    return found
