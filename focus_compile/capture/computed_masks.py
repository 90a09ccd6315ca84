"""Attention masks that a model computes itself, from a 2-D one or from none.

transformers' models make *causal* ones, under which a token does not see those on its right. A
diffusion LLM must: its calls bring a mask ``[B, 1, T, S + T]`` of their own.
"""

from __future__ import annotations

from torch.fx import Node

from focus_compile.axes.rules.table import EMBEDDINGS
from focus_compile.graph.nodes import aten, reachable

__all__ = ["makes_mask"]

_SOFTMAXES = (aten.softmax.int, aten._softmax.default)
_SDPA = aten.scaled_dot_product_attention.default


def makes_mask(node: Node) -> bool:
    """Whether a value is computed beside the tokens, for the mask of attention alone."""
    tokens: set[Node] = set()
    for candidate in node.graph.nodes:
        if candidate.op == "call_function" and candidate.target in EMBEDDINGS:
            tokens |= reachable(candidate, lambda value: value.users)
    beside = reachable(node, lambda value: value.users) - tokens
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
    after += [further for node in user.users for further in node.users]
    return any(node.target in _SOFTMAXES for node in after)
