"""Attention heads that ranks share out."""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import GraphModule, Node

from focus_compile.errors import Unsupported
from focus_compile.graph.sharding import Group, collectives
from focus_compile.ops.library import focus
from focus_compile.refusals import UNKNOWN_SHARDS

__all__ = ["sharded_heads"]


def sharded_heads(gm: GraphModule, queries: Sequence[Node]) -> Group | None:
    """The processes among which attention heads are shared out; None if each has all of them.

    Raises:
        Unsupported: some of these sites share them out and some do not.
    """
    groups: dict[Node, Group | None] = {}
    joined = (collectives.wait_tensor.default, focus.gather_ranks.default)
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            groups[node] = node.meta.get("shard")
        elif node.target in joined:
            groups[node] = None
        else:
            groups[node] = next((groups[arg] for arg in node.all_input_nodes if groups[arg]), None)
    group, *other_groups = (groups[query] for query in queries)
    for query, other_group in zip(queries[1:], other_groups, strict=True):
        if other_group != group:
            raise Unsupported(UNKNOWN_SHARDS, query)
    return group
