"""Attention sites and K/V writes of a canonical graph, in layer order.

A *site* is where tokens mix: ``scaled_dot_product_attention``, or matmul - scale - (+ mask) -
softmax - matmul. A *K/V write* is where a block's new keys or values join the history: ``cat``
along the token axis, or, without a cache, the site's own operand. Both are taken before grouped
heads are expanded: importance and attention read each key head once.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import networkx as nx
from torch.fx import GraphModule, Node

from focus_compile.axes import AxisMap, Role, tensor_of
from focus_compile.errors import Unsupported
from focus_compile.rules import argument, aten, cat_parts

__all__ = ["Site", "Write", "data_flow", "find_sites"]

_EXPANSIONS = (
    aten.unsqueeze.default, aten.expand.default, aten.reshape.default, aten.view.default,
    aten._unsafe_view.default, aten.clone.default, aten.contiguous.default,
)  # fmt: skip
_CASTS = (aten.to.dtype, aten._to_copy.default, aten.dropout.default, aten.clone.default)
_SCALES = (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar)


@dataclass(frozen=True)
class Write:
    """A K/V write, by node name.

    ``new`` computes the block's keys or values. ``cat`` joins them to ``past``, the input that
    holds the history; both are None where there is none.
    """

    new: str
    cat: str | None
    past: str | None
    batch_dim: int | None

    @property
    def keys(self) -> str:
        """What the site attends to, ``[batch, kv heads, history + token, size]``."""
        return self.cat or self.new


@dataclass(frozen=True)
class Site:
    """An attention site, by node name. ``region`` holds its nodes in order, ``out`` is the last."""

    layer: int
    query: str
    mask: str | None
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
    for node in gm.graph.nodes:
        match = _match(node)
        if match is None or not any(axes.holds(d, Role.TOKEN) for d in axes.of(match.query)):
            continue
        sites.append(_site(len(sites), match, axes))
    for site, after in pairwise(sites):
        nodes = {node.name: node for node in gm.graph.nodes}
        if not nx.has_path(data_flow(gm), nodes[site.out], nodes[after.query]):
            raise Unsupported("two attention sites run side by side", nodes[after.out])
    return tuple(sites)


def _site(layer: int, match: _Match, axes: AxisMap) -> Site:
    node = match.region[-1]
    query = axes.of(match.query)
    if len(query) != 4 or axes.position(query, Role.TOKEN) != 2:
        raise Unsupported(
            "the queries of an attention site are not [batch, heads, token, size]", node
        )
    if axes.position(query, Role.BATCH) not in (0, None):
        raise Unsupported("the batch axis of an attention site is not its first", node)
    key, value = (_write(operand, axes, node) for operand in (match.key, match.value))
    return Site(
        layer=layer,
        query=match.query.name,
        mask=match.mask.name if match.mask is not None else None,
        scale=match.scale,
        region=tuple(part.name for part in match.region),
        writes=(key, value),
        module=Unsupported("", node).module,
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
    if argument(node, 5, "is_causal", False):
        raise Unsupported("is_causal attention: pass an explicit block mask instead", node)
    if argument(node, 4, "dropout_p", 0.0):
        raise Unsupported("attention with dropout: call model.eval() first", node)
    mask = argument(node, 3, "attn_mask")
    scale = argument(node, 6, "scale")
    size = tensor_of(query).shape[-1]
    scale = float(size) ** -0.5 if scale is None else scale
    return _Match((node,), query, key, value, mask, scale)


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
        first, other = (*scores.args, None)[:2]
        if not isinstance(first, Node):
            return None
        if scores.target is aten.add.Tensor and isinstance(other, Node) and mask is None:
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
        raise Unsupported("attention scores are used outside their attention site", node)
    key = transposed.args[0]
    assert isinstance(key, Node)
    region = (transposed, scores, *before, *after, out)
    return _Match(region, query, key, value, mask, scale)


def _swapped(transpose: Node) -> set[int]:
    first: Any = transpose.args[1]
    second: Any = transpose.args[2]
    return {first % 4, second % 4}


def _write(operand: Node, axes: AxisMap, site: Node) -> Write:
    """The K/V write that feeds an operand of a site, grouped heads not yet expanded."""
    node, last = operand, operand
    while True:
        dims = axes.of(node)
        if node.target is aten.cat.default and any(axes.history(dim) for dim in dims):
            past, new = cat_parts(node)
            if past.op != "placeholder":
                raise Unsupported("past keys or values are changed before they are used", past)
            _check_groups(operand, node, axes, site)
            return _described(new, node.name, past.name, axes, site)
        if len(dims) == 4 and axes.position(dims, Role.TOKEN) == 2:
            last = node
        source = node.args[0] if node.args else None
        if node.target not in _EXPANSIONS or not isinstance(source, Node):
            break
        node = source
    if any(axes.history(dim) for dim in axes.of(operand)):
        raise Unsupported("the write of new keys or values into the cache is not understood", site)
    _check_groups(operand, last, axes, site)
    return _described(last, None, None, axes, site)


def _check_groups(operand: Node, source: Node, axes: AxisMap, site: Node) -> None:
    """Refuse an expansion in which query head h does not read key head ``h // (H / G)``."""
    expanded, stored = axes.of(operand)[1], axes.of(source)[1]
    if expanded[: len(stored)] != stored:
        raise Unsupported("neighbouring query heads do not share a key head", site)


def _described(new: Node, cat: str | None, past: str | None, axes: AxisMap, site: Node) -> Write:
    dims = axes.of(new)
    if axes.position(dims, Role.TOKEN) is None:
        raise Unsupported("keys or values of an attention site have no token axis", site)
    batch_dim = axes.position(dims, Role.BATCH)
    if len(dims) != 4 or axes.position(dims, Role.TOKEN) != 2 or batch_dim not in (0, None):
        raise Unsupported("new keys and values are not [batch, heads, token, size]", site)
    return Write(new.name, cat, past, batch_dim)
