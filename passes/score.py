"""Add the importance of every masked token at the two attention sites that are scored.

q0, k0  ->  importance0 = focus.importance(q0, k0, masked, scale)      likewise at layer 1

Where ranks share out heads, both are summed over ranks right after the second.

Where keys are changed after they were joined to the history, such as by a rotary embedding, k0 are
the block's among those that the site attends to.
"""

from __future__ import annotations

import operator

from torch.fx import GraphModule

from focus_compile.graph.replay import Replay
from focus_compile.graph.sharding import Group
from focus_compile.ops.library import focus
from focus_compile.plan.plan import Plan

__all__ = ["score"]


def score(gm: GraphModule, plan: Plan) -> GraphModule:
    """Insert ``focus.importance`` at the scored layers; adds the input ``masked``."""
    replay, nodes, outputs = Replay.copy(gm)
    masked = replay.add_input(plan.controls.masked)
    for site in plan.scored_sites:
        query, key = nodes[site.query], nodes[site.writes[0].new]
        with replay.before(nodes[site.region[0]]):
            if site.key != site.writes[0].joined:
                args = (nodes[site.key], masked)
                key = replay.call(focus.block.default, args, name=f"block{site.layer}_k")
            replay.call(
                focus.importance.default,
                (query, key, masked, site.scale),
                name=f"importance{site.layer}" + ("" if plan.heads is None else "_own"),
            )
            if plan.heads is not None and site.layer == plan.scored[1]:
                _sum_ranks(replay, plan.heads, plan.scored)
    return replay.finish(outputs)


def _sum_ranks(replay: Replay, heads: Group, scored: tuple[int, int]) -> None:
    """Where ranks have some heads each: importances of all heads, the same on every rank."""
    nodes = {node.name: node for node in replay.graph.nodes}
    per_rank = tuple(nodes[f"importance{layer}_own"] for layer in scored)
    args = (*per_rank, heads.ranks, heads.name)
    sums = replay.call(focus.sum_ranks.default, args, name="importances")
    for index, layer in enumerate(scored):
        replay.call(operator.getitem, (sums, index), name=f"importance{layer}")
