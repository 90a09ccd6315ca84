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

import networkx as nx
from torch.fx import GraphModule

from focus_compile.axes.axes import AxisMap, Role
from focus_compile.errors import Unsupported, module_path
from focus_compile.graph.nodes import data_flow
from focus_compile.plan.attention import Match, recognise, unexpanded
from focus_compile.plan.writes import Write, find_write
from focus_compile.refusals import BATCH_AXIS, QUERY_AXES, SITES_ABREAST

__all__ = ["Site", "find_sites"]


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


def find_sites(gm: GraphModule, axes: AxisMap) -> tuple[Site, ...]:
    """All attention sites whose queries are block tokens, in layer order.

    Raises:
        Unsupported: a site has a layout or a form that the passes do not understand.
    """
    sites: list[Site] = []
    flow = data_flow(gm)
    for node in gm.graph.nodes:
        match = recognise(node)
        if match is None or not any(axes.holds(d, Role.TOKEN) for d in axes.of(match.query)):
            continue
        sites.append(_site(len(sites), match, axes, flow))
    nodes = {node.name: node for node in gm.graph.nodes}
    for site, after in pairwise(sites):
        if not nx.has_path(flow, nodes[site.out], nodes[after.query]):
            raise Unsupported(SITES_ABREAST, nodes[after.out])
    return tuple(sites)


def _site(layer: int, match: Match, axes: AxisMap, flow: nx.DiGraph) -> Site:
    node = match.region[-1]
    query = axes.of(match.query)
    if len(query) != 4 or axes.position(query, Role.TOKEN) != 2:
        raise Unsupported(QUERY_AXES, node)
    if axes.position(query, Role.BATCH) not in (0, None):
        raise Unsupported(BATCH_AXIS, node)
    key, value = (unexpanded(operand, axes, node) for operand in (match.key, match.value))
    return Site(
        layer=layer,
        query=match.query.name,
        key=key.name,
        value=value.name,
        mask=match.mask.name if match.mask is not None else None,
        causal=match.causal,
        scale=match.scale,
        region=tuple(member.name for member in match.region),
        writes=(find_write(key, axes, node, flow), find_write(value, axes, node, flow)),
        module=module_path(node),
    )
