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
    of: dict[Node, Group | None] = {}
    joined = (collectives.wait_tensor.default, focus.gather_ranks.default)
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            of[node] = node.meta.get("shard")
        elif node.target in joined:
            of[node] = None
        else:
            of[node] = next((of[arg] for arg in node.all_input_nodes if of[arg]), None)
    first, *others = (of[query] for query in queries)
    for query, other in zip(queries[1:], others, strict=True):
        if other != first:
            raise Unsupported(UNKNOWN_SHARDS, query)
    return first
