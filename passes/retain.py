"""Decide which tokens later layers compute.

importance0, importance1  ->  retain_mask = focus.retain(importance1 - importance0, ...)
                              tokens, inverse, rows, sizes = focus.tables(retain_mask)
"""

from __future__ import annotations

import operator

from torch.fx import GraphModule

from focus_compile.graph.replay import Replay
from focus_compile.ops.library import focus
from focus_compile.plan.controls import CONTROL
from focus_compile.plan.plan import Plan

__all__ = ["retain"]


def retain(gm: GraphModule, plan: Plan) -> GraphModule:
    """Insert signal, selection and index tables; the output becomes ``(own outputs, CONTROL)``.

    Adds the inputs ``fed`` bool ``[B, T]``, ``progress`` int64 ``[B]``, ``average`` fp32 ``[B]``,
    ``alpha`` fp32 ``[]``, ``signal_weights`` fp32 ``[2]`` and ``signal_bias`` fp32 ``[B, T]``.
    """
    replay, nodes, outputs = Replay.copy(gm)
    masked = nodes["masked"]
    fed, progress, average, alpha, weights, bias = (
        replay.given(plan.inputs[name])
        for name in ("fed", "progress", "average", "alpha", "signal_weights", "signal_bias")
    )
    with replay.before(nodes[plan.sites[1].region[0]]):
        delta = replay.call(
            focus.signal.default,
            (nodes["importance0"], nodes["importance1"], weights, bias),
            name="delta",
        )
        mask = replay.call(
            focus.retain.default, (delta, masked, fed, progress, average, alpha), name="retain_mask"
        )
        tables = replay.call(focus.tables.default, (mask,), name="tables")
        parts = tuple(
            replay.call(operator.getitem, (tables, index), name=name)
            for index, name in enumerate(CONTROL[1:5])
        )
    return replay.finish((outputs, (mask, *parts, delta)))
