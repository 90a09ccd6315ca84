"""Run the passes in order over a canonical graph and verify the result by recomputation."""

from __future__ import annotations

from torch.fx import GraphModule

from focus_compile.passes import PASSES
from focus_compile.plan import Plan
from focus_compile.verify import InvalidGraph, verify

__all__ = ["rewrite"]


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
        verify(gm)
    except InvalidGraph:
        _blame(stages)
        raise
    return stages


def _blame(stages: list[tuple[str, GraphModule]]) -> None:
    for name, gm in stages:
        try:
            verify(gm)
        except InvalidGraph as error:
            raise InvalidGraph(f"after {name}: {error}") from error
