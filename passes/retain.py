"""Decide which tokens later layers compute.

importance0, importance1  ->  retain_mask = focus.retain(importance1 - importance0, ...)
                              tokens, inverse, rows, sizes = focus.tables(retain_mask)
"""

from __future__ import annotations

import operator

from torch.fx import GraphModule, Node

from focus_compile.graph.replay import Replay
from focus_compile.ops.library import focus
from focus_compile.plan.controls import Selection
from focus_compile.plan.plan import Plan

__all__ = ["retain"]


def retain(gm: GraphModule, plan: Plan) -> GraphModule:
    """Insert signal, selection and index tables; the output becomes ``(model outputs, selection)``.

    The selection holds the values of :class:`~focus_compile.plan.controls.Selection`, in order.
    Adds the inputs ``fed``, ``progress``, ``average``, ``alpha``, ``signal_weights`` and
    ``signal_bias``.
    """
    replay, nodes, outputs = Replay.copy(gm)
    controls = plan.controls
    masked = nodes[controls.masked.name]
    fed, progress, average, alpha, weights, bias = map(
        replay.add_input,
        (
            controls.fed, controls.progress, controls.average, controls.alpha,
            controls.signal_weights, controls.signal_bias,
        ),
    )  # fmt: skip
    importances = (nodes[f"importance{layer}"] for layer in plan.scored)
    with replay.before(nodes[plan.scored_sites[1].region[0]]):
        delta = replay.call(focus.signal.default, (*importances, weights, bias), name="delta")
        mask = replay.call(
            focus.retain.default, (delta, masked, fed, progress, average, alpha), name="retain_mask"
        )
        tables = replay.call(focus.tables.default, (mask,), name="tables")

        def table(index: int, name: str) -> Node:
            return replay.call(operator.getitem, (tables, index), name=name)

        selection = Selection(
            retain_mask=mask,
            order=table(0, "order"),
            inverse=table(1, "inverse"),
            places=table(2, "places"),
            sizes=table(3, "sizes"),
            delta=delta,
        )
    return replay.finish((outputs, tuple(vars(selection).values())))
