"""Add the importance of every masked token at the first two attention sites.

q0, k0  ->  importance0 = focus.importance(q0, k0, masked, scale)      likewise at layer 1

Where keys are changed after they were joined to the history, such as by a rotary embedding, k0 are
the block's among those that the site attends to.
"""

from __future__ import annotations

from torch.fx import GraphModule

from focus_compile.ops import focus
from focus_compile.plan import Plan
from focus_compile.replay import Replay

__all__ = ["score"]


def score(gm: GraphModule, plan: Plan) -> GraphModule:
    """Insert ``focus.importance`` at layers 0 and 1; adds the input ``masked`` bool ``[B, T]``."""
    replay, nodes, outputs = Replay.copy(gm)
    masked = replay.given(plan.inputs["masked"])
    for site in plan.sites[:2]:
        query, key = nodes[site.query], nodes[site.writes[0].new]
        with replay.before(nodes[site.region[0]]):
            if site.key != site.writes[0].joined:
                args = (nodes[site.key], masked)
                key = replay.call(focus.block.default, args, name=f"block{site.layer}_k")
            replay.call(
                focus.importance.default,
                (query, key, masked, site.scale),
                name=f"importance{site.layer}",
            )
    return replay.finish(outputs)
