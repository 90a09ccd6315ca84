"""The graph passes, in the order in which they run: canonical graph -> FOCUS graph.

A pass is a pure function ``(gm, plan) -> gm``; the input graph is left as it is. Installed as
``focus_compile.passes``.
"""

from __future__ import annotations

from collections.abc import Callable

from torch.fx import GraphModule

from focus_compile.graph.recompute import InvalidGraph, check_values
from focus_compile.passes.narrow import narrow
from focus_compile.passes.restore import restore
from focus_compile.passes.retain import retain
from focus_compile.passes.score import score
from focus_compile.plan.plan import Plan

__all__ = ["PASSES", "Pass", "rewrite"]

Pass = Callable[[GraphModule, Plan], GraphModule]

PASSES: tuple[Pass, ...] = (
    score,  # needs q and k of both sites while every token is still there
    retain,  # needs both importances
    narrow,  # needs the retain mask: everything after layer 1's q, k and v becomes packed
    restore,  # packed outputs leave the graph in canvas shape
)


def rewrite(gm: GraphModule, plan: Plan) -> list[tuple[str, GraphModule]]:
    """The graph after each pass, by name of the pass; the last one is the FOCUS graph.

    Every node of the last graph is recomputed, whichever pass made it. To recompute each pass's
    graph as well costs a quarter of the analysis, so that is done only to name the pass at fault.

    Raises:
        InvalidGraph: a node claims what it does not compute, naming the first pass that left it.
    """
    stages: list[tuple[str, GraphModule]] = []
    for apply in PASSES:
        gm = apply(gm, plan)
        stages.append((apply.__name__, gm))
    try:
        check_values(gm)
    except InvalidGraph:
        _blame(stages)
        raise
    return stages


def _blame(stages: list[tuple[str, GraphModule]]) -> None:
    for name, gm in stages:
        try:
            check_values(gm)
        except InvalidGraph as error:
            raise InvalidGraph(f"after {name}: {error}") from error
