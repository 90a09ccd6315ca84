"""FLOPs of one denoising step, dense and focus, as closed forms read off a canonical graph.

Counted: matrix products (``linear``, ``matmul``), attention, and the importance that FOCUS adds. A
multiply-add counts as 2. Elementwise work and memory traffic are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy

from focus_compile.axes import Axis, AxisMap, Dim, Role, graph_inputs
from focus_compile.canonical import Canonical
from focus_compile.dispatch import GROUPED
from focus_compile.inputs import Extent
from focus_compile.plan import Domain, Plan
from focus_compile.rules import aten, operands

__all__ = ["BATCH", "FED", "HISTORY", "RETAINED", "TOKENS", "Cost", "cost_of"]

BATCH, TOKENS, HISTORY, FED, RETAINED = sympy.symbols("B T S F N", positive=True, integer=True)
"""Rows, tokens of a block, tokens of the history; fed and retained tokens of the whole batch."""

_COUNTS = {Domain.FED: FED, Domain.RETAINED: RETAINED}


@dataclass(frozen=True)
class Cost:
    """FLOPs of one step: ``dense`` in B, T, S; ``focus`` in B, T, S, F (fed), N (retained)."""

    dense: sympy.Expr
    focus: sympy.Expr

    def flops(
        self, batch: int, tokens: int, history: int, fed: int, retained: int
    ) -> tuple[int, int]:
        """(dense, focus) FLOPs of one step with these sizes; fed and retained over the batch."""
        sizes = {BATCH: batch, TOKENS: tokens, HISTORY: history, FED: fed, RETAINED: retained}
        return int(self.dense.subs(sizes)), int(self.focus.subs(sizes))


def cost_of(canonical: Canonical, plan: Plan) -> Cost:
    """Cost of a canonical graph and of what the passes make of it."""
    axes = canonical.axes
    names = _names(canonical)
    nodes = {node.name: node for node in canonical.gm.graph.nodes}
    inside = {name for site in plan.sites for name in site.region}
    dense: sympy.Expr = sympy.Integer(0)
    focus: sympy.Expr = sympy.Integer(0)

    def size(dim: Dim, domain: Domain | None = None) -> sympy.Expr:
        return _size(axes, names, dim, domain)

    for node in canonical.gm.graph.nodes:
        if node.op != "call_function" or node.name in inside:
            continue
        if node.target in (
            aten.linear.default,
            aten.matmul.default,
            aten.bmm.default,
            aten.mm.default,
            *GROUPED,
        ):
            place = plan.packed.get(node.name)
            inner = axes.of(operands(node)[0])[-1]
            work = [2 * size(inner)] * 2
            for dim in axes.of(node):
                work[0] *= size(dim)
                work[1] *= size(dim, place.domain if place else None)
            dense, focus = dense + work[0], focus + work[1]
    for site in plan.sites:
        query = axes.of(nodes[site.query])
        key, value = (axes.of(nodes[name]) for name in (site.key, site.value))
        per_query = 2 * size(query[1]) * size(key[2]) * (size(query[3]) + size(value[3]))
        dense += BATCH * TOKENS * per_query
        focus += _COUNTS[plan.packed[site.out].domain] * per_query
        if site.layer < 2:
            focus += 2 * BATCH * TOKENS**2 * size(query[1]) * size(query[3])
    return Cost(sympy.expand(dense), sympy.expand(focus))


def _names(canonical: Canonical) -> dict[Axis, Extent]:
    names: dict[Axis, Extent] = {}
    for node, given in zip(graph_inputs(canonical.gm), canonical.inputs, strict=True):
        for dim, extent in zip(canonical.axes.of(node), given.shape, strict=True):
            if isinstance(extent, str) and len(dim) == 1:
                names[dim[0]] = extent
    return names


def _size(axes: AxisMap, names: dict[Axis, Extent], dim: Dim, domain: Domain | None) -> sympy.Expr:
    out: sympy.Expr = sympy.Integer(1)
    for axis in axes.resolve(dim):
        if axis.role is Role.BATCH:
            out *= 1 if domain else BATCH
        elif axis.role is Role.TOKEN:
            out *= _COUNTS[domain] if domain else TOKENS
        elif axis.order is not None:
            out *= _size(axes, names, axis.order, domain)
        elif axis.sum is not None:
            out *= sympy.Add(*(_size(axes, names, part, domain) for part in axis.sum))
        elif axis in names:
            name = str(names[axis])
            out *= HISTORY if name == "history" else sympy.Symbol(name, positive=True, integer=True)
        else:
            out *= axis.size
    return out
