"""The graph passes, in the order in which they run: canonical graph -> FOCUS graph.

A pass is a pure function ``(gm, plan) -> gm``; the input graph is left as it is. Installed as
``focus_compile.passes``.
"""

from __future__ import annotations

from collections.abc import Callable

from torch.fx import GraphModule

from focus_compile.passes.narrow import narrow
from focus_compile.passes.restore import restore
from focus_compile.passes.retain import retain
from focus_compile.passes.score import score
from focus_compile.plan import Plan

__all__ = ["PASSES", "Pass"]

Pass = Callable[[GraphModule, Plan], GraphModule]

PASSES: tuple[Pass, ...] = (
    score,  # needs q and k of both sites while every token is still there
    retain,  # needs both importances
    narrow,  # needs the retain mask: everything after layer 1's q, k and v becomes packed
    restore,  # packed outputs leave the graph in canvas shape
)
