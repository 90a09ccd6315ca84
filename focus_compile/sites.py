"""Attention sites and K/V writes of a canonical graph, in layer order.

A *site* is where tokens mix: ``scaled_dot_product_attention``, or matmul - scale - (+ mask) -
softmax - matmul. A *K/V write* is where a block's new keys or values join the history: ``cat``
along the token axis, or, without a cache, the site's own operand. What stands between the two, such
as the rotary embedding of models that cache keys without it, is computed for all keys of every row.
Operands are taken before grouped heads are expanded: importance and attention read each key head
once.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import networkx as nx
from torch.fx import GraphModule, Node

from focus_compile.axes import AxisMap, Dim, Dims, Role, tensor_of
from focus_compile.errors import Unsupported, module_path
from focus_compile.ops import focus
from focus_compile.refusals import (
    BATCH_AXIS,
    CACHE_WRITE,
    DROPOUT,
    HEAD_GROUPS,
    KEY_AXES,
    KEYS_MIXED,
    KEYS_WITHOUT_TOKENS,
    MASK_NOT_ADDITIVE,
    MASK_SCALED,
    NEW_KEY_AXES,
    PAST_CHANGED,
    QUERY_AXES,
    SCORES_USED,
    SITES_ABREAST,
)
from focus_compile.rules import argument, aten, cat_parts, operands

__all__ = ["Site", "Write", "data_flow", "find_sites"]

_EXPANSIONS = (
    aten.unsqueeze.default, aten.expand.default, aten.reshape.default, aten.view.default,
    aten._unsafe_view.default, aten.clone.default, aten.contiguous.default,
    aten.repeat_interleave.self_int,
)  # fmt: skip
_CASTS = (aten.to.dtype, aten._to_copy.default, aten.dropout.default, aten.clone.default)
_SCALES = (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar)


@dataclass(frozen=True)
class Write:
    """A K/V write, by node name.

    ``new`` computes the block's keys or values. ``cat`` joins them to ``history``: to ``past``, the
    input that holds it, or to what is left of it where the block replaces the slots ``index`` of a
    cache of fixed length. All are None where there is no history.
    """

    new: str
    cat: str | None
    past: str | None
    history: str | None
    index: str | None
    batch_dim: int | None
    token_dim: int

    @property
    def joined(self) -> str:
        """Keys or values of history and block, as the cache holds them."""
        return self.cat or self.new


@dataclass(frozen=True)
class Site:
    """An attention site, by node name. ``region`` holds its nodes in order, ``out`` is the last.

    ``query`` is ``[batch, heads, token, size]``; ``key`` and ``value`` are
    ``[batch, kv heads, history + token, size]``. ``causal``: key j is hidden from query i < j.
    """

    layer: int
    query: str
    key: str
    value: str
    mask: str | None
    causal: bool
    scale: float
    region: tuple[str, ...]
    writes: tuple[Write, Write]
    module: str

    @property
    def out(self) -> str:
        return self.region[-1]


@dataclass(frozen=True)
class _Match:
    region: tuple[Node, ...]
    query: Node
    key: Node
    value: Node
    mask: Node | None
    scale: float
    causal: bool = False


def data_flow(gm: GraphModule) -> nx.DiGraph:
    """The data-flow graph, on nodes."""
    graph: nx.DiGraph = nx.DiGraph()
    graph.add_nodes_from(gm.graph.nodes)
    graph.add_edges_from(
        (source, node) for node in gm.graph.nodes for source in node.all_input_nodes
    )
    return graph


def find_sites(gm: GraphModule, axes: AxisMap) -> tuple[Site, ...]:
    """All attention sites whose queries are block tokens, in layer order.

    Raises:
        Unsupported: a site has a layout or a form that the passes do not understand.
    """
    sites: list[Site] = []
    flow = data_flow(gm)
    for node in gm.graph.nodes:
        match = _match(node)
        if match is None or not any(axes.holds(d, Role.TOKEN) for d in axes.of(match.query)):
            continue
        sites.append(_site(len(sites), match, axes, flow))
    nodes = {node.name: node for node in gm.graph.nodes}
    for site, after in pairwise(sites):
        if not nx.has_path(flow, nodes[site.out], nodes[after.query]):
            raise Unsupported(SITES_ABREAST, nodes[after.out])
    return tuple(sites)


def _site(layer: int, match: _Match, axes: AxisMap, flow: nx.DiGraph) -> Site:
    node = match.region[-1]
    query = axes.of(match.query)
    if len(query) != 4 or axes.position(query, Role.TOKEN) != 2:
        raise Unsupported(QUERY_AXES, node)
    if axes.position(query, Role.BATCH) not in (0, None):
        raise Unsupported(BATCH_AXIS, node)
    key, value = (_attended(operand, axes, node) for operand in (match.key, match.value))
    return Site(
        layer=layer,
        query=match.query.name,
        key=key.name,
        value=value.name,
        mask=match.mask.name if match.mask is not None else None,
        causal=match.causal,
        scale=match.scale,
        region=tuple(part.name for part in match.region),
        writes=(_write(key, axes, node, flow), _write(value, axes, node, flow)),
        module=module_path(node),
    )


def _match(node: Node) -> _Match | None:
    if node.op != "call_function":
        return None
    if node.target is aten.scaled_dot_product_attention.default:
        return _match_sdpa(node)
    if node.target in (aten.softmax.int, aten._softmax.default):
        return _match_softmax(node)
    return None


def _match_sdpa(node: Node) -> _Match:
    query, key, value = node.args[:3]
    assert isinstance(query, Node) and isinstance(key, Node) and isinstance(value, Node)
    if argument(node, 4, "dropout_p", 0.0):
        raise Unsupported(DROPOUT, node)
    mask = argument(node, 3, "attn_mask")
    scale = argument(node, 6, "scale")
    size = tensor_of(query).shape[-1]
    scale = float(size) ** -0.5 if scale is None else scale
    causal = argument(node, 5, "is_causal", False)
    return _Match((node,), query, key, value, mask, scale, causal)


def _match_softmax(node: Node) -> _Match | None:
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
    if any(len(part.users) != 1 for part in (scores, *before)):
        raise Unsupported(SCORES_USED, node)
    key = transposed.args[0]
    assert isinstance(key, Node)
    region = (transposed, scores, *before, *after, out)
    return _Match(region, query, key, value, mask, scale)


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
    first: Any = transpose.args[1]
    second: Any = transpose.args[2]
    return {first % 4, second % 4}


def _attended(operand: Node, axes: AxisMap, site: Node) -> Node:
    """What an operand of a site was before grouped heads were expanded."""
    node, last = operand, operand
    while node.target in _EXPANSIONS and isinstance(node.args[0], Node):
        node = node.args[0]
        dims = axes.of(node)
        if len(dims) == 4 and _along(axes, dims) == 2:
            last = node
    dims = axes.of(last)
    if len(dims) != 4 or _along(axes, dims) is None:
        raise Unsupported(KEYS_WITHOUT_TOKENS, site)
    if _along(axes, dims) != 2 or axes.position(dims, Role.BATCH) not in (0, None):
        raise Unsupported(KEY_AXES, site)
    _check_groups(operand, last, axes, site)
    return last


def _along(axes: AxisMap, dims: Dims) -> int | None:
    """Index of the dim of keys: block tokens, or the history and them."""
    for index, dim in enumerate(dims):
        if axes.history(dim) is not None:
            return index
    return axes.position(dims, Role.TOKEN)


def _write(attended: Node, axes: AxisMap, site: Node, flow: nx.DiGraph) -> Write:
    """The K/V write whose result, as it is or token by token changed, a site attends to."""
    if not _holds_history(attended, axes):
        dims = axes.of(attended)
        batch_dim = axes.position(dims, Role.BATCH)
        return Write(attended.name, None, None, None, None, batch_dim, 2)
    found: dict[Node, None] = {}
    queue, seen = [attended], {attended}
    while queue:
        node = queue.pop()
        if node.target is aten.cat.default and _joins(node, axes):
            found[node] = None
            continue
        for source in operands(node):
            if source not in seen and _holds_history(source, axes):
                seen.add(source)
                queue.append(source)
    if len(found) != 1:
        raise Unsupported(CACHE_WRITE, site)
    (cat,) = found
    for node in nx.descendants(flow, cat) & (nx.ancestors(flow, attended) | {attended}):
        if node in axes.unruled or any(_is_keys(dim, axes) for dim in axes.mixed.get(node, ())):
            raise Unsupported(KEYS_MIXED, node)
    history, new = cat_parts(cat)
    past: Any = history
    index: str | None = None
    if history.target is focus.clear.default:
        past, places, _ = history.args
        index = str(places)
    if past.op != "placeholder":
        raise Unsupported(PAST_CHANGED, past)
    dims = axes.of(new)
    token_dim, batch_dim = axes.position(dims, Role.TOKEN), axes.position(dims, Role.BATCH)
    if token_dim in (0, None) or batch_dim not in (0, None):
        raise Unsupported(NEW_KEY_AXES, site)
    assert token_dim is not None
    return Write(new.name, cat.name, past.name, history.name, index, batch_dim, token_dim)


def _holds_history(node: Node, axes: AxisMap) -> bool:
    return any(_is_keys(dim, axes) for dim in axes.of(node))


def _is_keys(dim: Dim, axes: AxisMap) -> bool:
    return axes.history(dim) is not None


def _joins(cat: Node, axes: AxisMap) -> bool:
    """Whether a ``cat`` makes the axis of history and block."""
    at = argument(cat, 1, "dim", 0) % tensor_of(cat).dim()
    return axes.history(axes.of(cat)[at]) is not None and len(cat_parts(cat)) == 2


def _check_groups(operand: Node, source: Node, axes: AxisMap, site: Node) -> None:
    """Refuse an expansion in which query head h does not read key head ``h // (H / G)``."""
    expanded, stored = axes.of(operand)[1], axes.of(source)[1]
    if expanded[: len(stored)] != stored:
        raise Unsupported(HEAD_GROUPS, site)
