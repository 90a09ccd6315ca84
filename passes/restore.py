"""Give packed outputs their canvas shape; 0 at tokens that were not computed.

logits [1, N, V]  ->  focus.restore(logits, tokens, retain_mask) [B, T, V]
"""

from __future__ import annotations

from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from focus_compile.errors import Unsupported
from focus_compile.graph.replay import Replay
from focus_compile.ops.library import focus
from focus_compile.plan.controls import Selection
from focus_compile.plan.domains import Domain
from focus_compile.plan.plan import Plan
from focus_compile.refusals import RETURNS_ANOTHER_ORDER

__all__ = ["restore"]


def restore(gm: GraphModule, plan: Plan) -> GraphModule:
    """Scatter every packed output of the model back to ``[B, T, ...]``."""
    replay, nodes, outputs = Replay.copy(gm)
    model_outputs, selection, kv = outputs
    controls = plan.controls
    tables = {
        Domain.FED: (nodes[controls.fed_tokens.name], nodes[controls.fed.name]),
        Domain.RETAINED: (nodes[plan.tables.tokens.name], Selection(*selection).retain_mask),
    }

    def scatter(node: Node) -> Node:
        place = plan.packed.get(node.name)
        if place is None:
            return node
        if place.token_dim is None or place.folded:
            raise Unsupported(RETURNS_ANOTHER_ORDER, node)
        tokens, keep = tables[place.domain]
        return replay.call(
            focus.restore.default, (node, tokens, keep, place.batch_dim, place.token_dim)
        )

    return replay.finish((map_arg(model_outputs, scatter), selection, kv))
