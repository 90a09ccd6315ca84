"""The forms of attention that are recognised: one operator, or matrix products and a softmax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from focus_compile.axes.axes import AxisMap, Dims, Role
from focus_compile.errors import Unsupported
from focus_compile.graph.nodes import argument, aten, tensor_of
from focus_compile.refusals import (
    DROPOUT,
    HEAD_GROUPS,
    KEY_AXES,
    KEYS_WITHOUT_TOKENS,
    MASK_NOT_ADDITIVE,
    MASK_SCALED,
    SCORES_USED,
)

__all__ = ["Match", "recognise", "unexpanded"]

_EXPANSIONS = (
    aten.unsqueeze.default, aten.expand.default, aten.reshape.default, aten.view.default,
    aten._unsafe_view.default, aten.clone.default, aten.contiguous.default,
    aten.repeat_interleave.self_int,
)  # fmt: skip
_CASTS = (aten.to.dtype, aten._to_copy.default, aten.dropout.default, aten.clone.default)
_SCALES = (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar)


@dataclass(frozen=True)
class Match:
    """A form of attention in a graph.

    ``region`` holds the nodes that are replaced, in order. Query, key, value and its last node are
    ``[batch, heads, token, size]``; the mask has up to four dims. A form that folds heads into the
    batch (``bmm``) has its reshapes in the region, and the match gives what was there before them.
    Else ``sites._site`` refuses QUERY_AXES, or ``_check_groups`` HEAD_GROUPS.
    """

    region: tuple[Node, ...]
    query: Node
    key: Node
    value: Node
    mask: Node | None
    scale: float
    causal: bool = False


def recognise(node: Node) -> Match | None:
    """The form of attention that a node is the heart of: a fused operator, or a softmax."""
    if node.op != "call_function":
        return None
    if node.target is aten.scaled_dot_product_attention.default:
        return _match_sdpa(node)
    if node.target in (aten.softmax.int, aten._softmax.default):
        return _match_softmax(node)
    return None


def _match_sdpa(node: Node) -> Match:
    query, key, value = node.args[:3]
    assert isinstance(query, Node) and isinstance(key, Node) and isinstance(value, Node)
    if argument(node, 4, "dropout_p", 0.0):
        raise Unsupported(DROPOUT, node)
    mask = argument(node, 3, "attn_mask")
    scale = argument(node, 6, "scale")
    size = tensor_of(query).shape[-1]
    scale = float(size) ** -0.5 if scale is None else scale
    causal = argument(node, 5, "is_causal", False)
    return Match((node,), query, key, value, mask, scale, causal)


def _match_softmax(node: Node) -> Match | None:
    """Eager attention around a softmax over keys; None if the softmax is not one of attention."""
    scores = node.args[0]
    assert isinstance(scores, Node)
    rank = tensor_of(node).dim()
    if argument(node, 1, "dim") % rank != rank - 1:
        return None
    before: list[Node] = []
    mask: Node | None = None
    scale = 1.0
    while scores.target is not aten.matmul.default:
        first, other = (*scores.args, None, None)[:2]
        if not isinstance(first, Node):
            return None
        if scores.target is aten.add.Tensor and isinstance(other, Node) and mask is None:
            _check_mask(scores, other, scale)
            mask = other
        elif scores.target in _SCALES and isinstance(other, int | float):
            scale = scale * other if scores.target in _SCALES[:2] else scale / other
        elif scores.target not in _CASTS:
            return None
        before.insert(0, scores)
        scores = first
    transposed: Any = scores.args[1]
    out, after = node, list[Node]()
    while out.target is not aten.matmul.default:
        if len(out.users) != 1 or (out is not node and out.target not in _CASTS):
            return None
        after.append(out)
        out = next(iter(out.users))
    query, value = scores.args[0], out.args[1]
    if out.args[0] is not after[-1]:
        return None
    if not (isinstance(transposed, Node) and isinstance(query, Node) and isinstance(value, Node)):
        return None
    if transposed.target is not aten.transpose.int or _swapped(transposed) != {2, 3}:
        return None
    if any(len(node_before.users) != 1 for node_before in (scores, *before)):
        raise Unsupported(SCORES_USED, node)
    key = transposed.args[0]
    assert isinstance(key, Node)
    region = (transposed, scores, *before, *after, out)
    return Match(region, query, key, value, mask, scale)


def _check_mask(add: Node, mask: Node, scale: float) -> None:
    """Refuse what is added to scores, walking back from the softmax, if it is no additive mask."""
    if scale != 1.0 or add.kwargs.get("alpha", 1) != 1:
        raise Unsupported(MASK_SCALED, add)
    if not tensor_of(mask).dtype.is_floating_point:
        raise Unsupported(
            MASK_NOT_ADDITIVE,
            add,
        )


def _swapped(transpose: Node) -> set[int]:
    dim0: Any = transpose.args[1]
    dim1: Any = transpose.args[2]
    return {dim0 % 4, dim1 % 4}


def unexpanded(operand: Node, axes: AxisMap, site: Node) -> Node:
    """What an operand of a site was before grouped heads were expanded."""
    node, last = operand, operand
    while node.target in _EXPANSIONS and isinstance(node.args[0], Node):
        node = node.args[0]
        dims = axes.of(node)
        if len(dims) == 4 and _key_dim(axes, dims) == 2:
            last = node
    dims = axes.of(last)
    if len(dims) != 4 or _key_dim(axes, dims) is None:
        raise Unsupported(KEYS_WITHOUT_TOKENS, site)
    if _key_dim(axes, dims) != 2 or axes.position(dims, Role.BATCH) not in (0, None):
        raise Unsupported(KEY_AXES, site)
    _check_groups(operand, last, axes, site)
    return last


def _key_dim(axes: AxisMap, dims: Dims) -> int | None:
    """Index of the dim of keys: block tokens, or the history and them."""
    for index, dim in enumerate(dims):
        if axes.history(dim) is not None:
            return index
    return axes.position(dims, Role.TOKEN)


def _check_groups(operand: Node, source: Node, axes: AxisMap, site: Node) -> None:
    """Refuse an expansion in which query head h does not read key head ``h // (H / G)``."""
    expanded, stored = axes.of(operand)[1], axes.of(source)[1]
    if expanded[: len(stored)] != stored:
        raise Unsupported(HEAD_GROUPS, site)
