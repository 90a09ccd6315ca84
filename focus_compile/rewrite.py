"""Run the passes in order over a canonical graph, each verified by recomputation."""

from __future__ import annotations

from torch.fx import GraphModule

from focus_compile.passes import PASSES
from focus_compile.plan import Plan
from focus_compile.verify import verify

__all__ = ["rewrite"]


def rewrite(gm: GraphModule, plan: Plan) -> list[tuple[str, GraphModule]]:
    """The graph after each pass, by name of the pass; the last one is the FOCUS graph."""
    stages: list[tuple[str, GraphModule]] = []
    for apply in PASSES:
        gm = apply(gm, plan)
        verify(gm)
        stages.append((apply.__name__, gm))
    return stages
