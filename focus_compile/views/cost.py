"""FLOPs and bytes of one denoising step, dense and focus, as closed forms read off a graph.

Counted: matrix products (``linear``, ``matmul``, those of experts), attention, and the importance
that FOCUS adds. A multiply-add counts as 2 FLOPs. Bytes are those of the operands and the result of
each of these, every one once: what must be moved if nothing else stays in fast memory. An operand
that is computed from weights alone counts as what it is computed from: a quantised weight as its
packed numbers and their scales. Elementwise work, gathers and scatters, masks and embedding rows
are not counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import sympy
from torch.fx import Node

from focus_compile.axes.axes import Axis, AxisMap, Dim, Role
from focus_compile.axes.rules.experts import GROUPED
from focus_compile.axes.rules.products import is_packed_product
from focus_compile.capture.canonical import Canonical
from focus_compile.graph.nodes import aten, graph_inputs, operands, tensor_of
from focus_compile.graph.sizes import Extent
from focus_compile.ops.library import focus
from focus_compile.plan.domains import Domain, Place
from focus_compile.plan.plan import Plan
from focus_compile.plan.sites import Site

__all__ = ["BATCH", "FED", "HISTORY", "RETAINED", "TOKENS", "Cost", "cost_of"]

BATCH, TOKENS, HISTORY, FED, RETAINED = sympy.symbols("B T S F N", positive=True, integer=True)
"""Rows, tokens of a block, tokens of the history; fed and retained tokens of the whole batch."""

_ZERO, _ONE = sympy.Integer(0), sympy.Integer(1)
_SYMBOLS = (BATCH, TOKENS, HISTORY, FED, RETAINED)
_COUNTS = {Domain.FED: FED, Domain.RETAINED: RETAINED}
_PRODUCTS = (
    aten.linear.default,
    aten.matmul.default,
    aten.bmm.default,
    aten.mm.default,
    aten.addmm.default,
    aten._int_mm.default,
    aten._scaled_mm.default,
    *GROUPED,
)


@dataclass(frozen=True)
class Cost:
    """Work of one step: ``dense`` in B, T, S; ``focus`` in B, T, S, F (fed), N (retained).

    ``dense`` and ``focus`` are FLOPs; ``dense_bytes`` and ``focus_bytes`` bytes. ``layers``: of the
    model; ``layer``: what one of those after layer 1 adds on average, None where there is none.
    """

    dense: sympy.Expr
    focus: sympy.Expr
    dense_bytes: sympy.Expr
    focus_bytes: sympy.Expr
    layers: int = 0
    layer: Cost | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_ratio"}

    def flops(
        self, batch: int, tokens: int, history: int, fed: int, retained: int
    ) -> tuple[int, int]:
        """(dense, focus) FLOPs of one step with these sizes; fed and retained over the batch."""
        return _numbers(self.dense, self.focus, batch, tokens, history, fed, retained)

    def bytes(
        self, batch: int, tokens: int, history: int, fed: int, retained: int
    ) -> tuple[int, int]:
        """(dense, focus) bytes of one step, likewise."""
        return _numbers(self.dense_bytes, self.focus_bytes, batch, tokens, history, fed, retained)

    @property
    def ratio(self) -> sympy.Expr:
        """Dense over focus FLOPs: how many times faster, where time goes by FLOPs."""
        return self.dense / self.focus

    def speedup(self, batch: Any, tokens: Any, history: Any, fed: Any, retained: Any) -> Any:
        """:attr:`ratio` for numbers, or for arrays of them (of floating point), as plots want."""
        return self._ratio(batch, tokens, history, fed, retained)

    @cached_property
    def _ratio(self) -> Any:
        return sympy.lambdify(_SYMBOLS, self.ratio, modules="math")

    def of_layers(self, layers: int | sympy.Expr) -> Cost:
        """The same model with another number of layers, or with a symbol for it.

        Raises:
            ValueError: the model has two layers: nothing tells what one more would cost.
        """
        if self.layer is None:
            raise ValueError("the model has no layer after layer 1: nothing tells what one costs")
        added = layers - self.layers
        return Cost(
            sympy.expand(self.dense + added * self.layer.dense),
            sympy.expand(self.focus + added * self.layer.focus),
            sympy.expand(self.dense_bytes + added * self.layer.dense_bytes),
            sympy.expand(self.focus_bytes + added * self.layer.focus_bytes),
        )

    def limit_of_long_blocks(self, fed: sympy.Expr, retained: sympy.Expr) -> sympy.Expr:
        """Limit of :attr:`ratio` for T to infinity, these shares of a block fed and retained.

        Only attention and importance grow with the square of T. With L layers of like heads it is
        ``L / (fed + (L - 1) retained + 1)``: layer 0 computes fed tokens, the others retained ones,
        and both importances together cost one layer's attention.
        """
        shares = {FED: fed * BATCH * TOKENS, RETAINED: retained * BATCH * TOKENS}
        return sympy.limit(sympy.cancel(self.ratio.subs(shares)), TOKENS, sympy.oo)

    def limit_of_budget(self, alpha: sympy.Expr, average: sympy.Expr) -> sympy.Expr:
        """:attr:`ratio` in B, T, S and F where rows retain ``alpha * average`` tokens.

        That is what FOCUS aims at, ``average`` tokens being decoded per row and step
        (docs/algorithm.md section 3); what it retains beyond, neighbours above all, costs more.
        """
        return self.ratio.subs(RETAINED, alpha * average * BATCH)


def cost_of(canonical: Canonical, plan: Plan) -> Cost:
    """Cost of a canonical graph and of what the passes make of it."""
    counter = _Counter(canonical, plan)
    dense, focus = counter.by_layer({}), counter.by_layer(plan.packed)
    layers = len(plan.sites)
    later = None
    if layers > 2:
        later = _cost(dense[2:layers], focus[2:layers], sympy.Rational(1, layers - 2))
    cost = _cost(dense, [*focus, counter.importance()])
    return replace(cost, layers=layers, layer=later)


def _cost(dense: Sequence[_Work], focus: Sequence[_Work], share: sympy.Expr = _ONE) -> Cost:
    total, ours = (sum(parts, _Work()) for parts in (dense, focus))
    sums = (total.flops, ours.flops, total.bytes, ours.bytes)
    return Cost(*(sympy.expand(share * value) for value in sums))


@dataclass(frozen=True)
class _Work:
    flops: sympy.Expr = _ZERO
    bytes: sympy.Expr = _ZERO

    def __add__(self, other: _Work) -> _Work:
        return _Work(self.flops + other.flops, self.bytes + other.bytes)


class _Counter:
    """Counts the work of a graph, whose values are packed as a mapping says; {}: none is."""

    def __init__(self, canonical: Canonical, plan: Plan) -> None:
        self.axes = canonical.axes
        self.names = _names(canonical)
        self.weights = _weights(canonical)
        self.nodes = {node.name: node for node in canonical.gm.graph.nodes}
        self.sites, self.scored = plan.sites, plan.scored_sites

    def by_layer(self, packed: Mapping[str, Place]) -> list[_Work]:
        """Work between one attention site and the next, that of the next included.

        What stands before the first site comes first, and what stands after the last one last. An
        entry from 2 on holds one layer's work: the rest of the layer before, and its own up to its
        attention.
        """
        inside = {name for site in self.sites for name in site.region}
        outs = {site.out for site in self.sites}
        work = [_Work()] * (len(self.sites) + 1)
        passed: dict[Node, int] = {}
        for node in self.nodes.values():
            sites_passed = (passed[arg] + (arg.name in outs) for arg in node.all_input_nodes)
            passed[node] = max(sites_passed, default=0)
            product = node.target in _PRODUCTS or is_packed_product(node)
            if product and node.name not in inside:
                work[passed[node]] += self._product(node, packed)
            if node.target is focus.experts.default:
                work[passed[node]] += self._experts(node, packed)
        for site in self.sites:
            work[site.layer] += self._attention(site, packed)
        return work

    def importance(self) -> _Work:
        work = _Work()
        for site in self.scored:
            query, key = (self.axes.of(self.nodes[name]) for name in (site.query, site.key))
            heads, groups, size = self._size(query[1]), self._size(key[1]), self._size(query[3])
            moved = (heads + groups) * size * _bytes(self.nodes[site.query]) + 4
            work += _Work(2 * BATCH * TOKENS**2 * heads * size, BATCH * TOKENS * moved)
        return work

    def _product(self, node: Node, packed: Mapping[str, Place]) -> _Work:
        first, *rest = operands(node)[node.target is aten.addmm.default :]
        inner = self._size(self.axes.of(first)[-1])
        factors = (first, *(rest if is_packed_product(node) else rest[:1]))
        read = {source for value in factors for source in self.weights.get(value, {value})}
        sizes = [self._numel(value, packed) * _bytes(value) for value in (*read, node)]
        return _Work(2 * inner * self._numel(node, packed), sympy.Add(*sizes))

    def _experts(self, node: Node, packed: Mapping[str, Place]) -> _Work:
        """Every choice of a token is one expert's work; of all experts the weights are read."""
        x, ids, _, *matrices = operands(node)
        lists: list[Sequence[Node]] = list(node.args[3:-1])  # type: ignore[arg-type]
        one = sympy.Add(*(self._numel(each[0], packed) for each in lists if each))
        sizes = [self._numel(value, packed) * _bytes(value) for value in (*matrices, x, node)]
        return _Work(2 * one * self._numel(ids, packed), sympy.Add(*sizes))

    def _attention(self, site: Site, packed: Mapping[str, Place]) -> _Work:
        """Fixed caches: the block's keys join their slots where focus attends, and there only."""
        query, key, value = (
            self.axes.of(self.nodes[name]) for name in (site.query, site.key, site.value)
        )
        place = packed.get(site.out)
        queries = BATCH * TOKENS if place is None else _COUNTS[place.domain]
        keys = self._size(key[2])
        if site.writes[0].index is not None and place is None:
            keys -= TOKENS
        sizes = self._size(query[3]) + self._size(value[3])
        heads, groups = self._size(query[1]), self._size(key[1])
        moved = (queries * heads + BATCH * groups * keys) * sizes
        work = 2 * queries * heads * keys * sizes
        return _Work(work, moved * _bytes(self.nodes[site.query]))

    def _numel(self, node: Node, packed: Mapping[str, Place]) -> sympy.Expr:
        place = packed.get(node.name)
        domain = None if place is None else place.domain
        return sympy.Mul(*(self._size(dim, domain) for dim in self.axes.of(node)))

    def _size(self, dim: Dim, domain: Domain | None = None) -> sympy.Expr:
        return _size(self.axes, self.names, dim, domain)


def _weights(canonical: Canonical) -> dict[Node, set[Node]]:
    """Inputs that no call changes the size of, and what is computed from these alone: of which."""
    inputs = zip(graph_inputs(canonical.gm), canonical.inputs, strict=True)
    made_of = {node: {node} for node, spec in inputs if not spec.symbolic}
    for node in canonical.gm.graph.nodes:
        sources = operands(node)
        if sources and all(source in made_of for source in sources):
            made_of[node] = {one for source in sources for one in made_of[source]}
    return made_of


def _bytes(node: Node) -> int:
    """Of one element."""
    return tensor_of(node).dtype.itemsize


def _numbers(dense: sympy.Expr, focus: sympy.Expr, batch: int, *counts: int) -> tuple[int, int]:
    sizes = dict(zip(_SYMBOLS, (batch, *counts), strict=True))
    return int(dense.subs(sizes)), int(focus.subs(sizes))


def _names(canonical: Canonical) -> dict[Axis, Extent]:
    names: dict[Axis, Extent] = {}
    for node, spec in zip(graph_inputs(canonical.gm), canonical.inputs, strict=True):
        for dim, extent in zip(canonical.axes.of(node), spec.shape, strict=True):
            if isinstance(extent, str) and len(dim) == 1:
                names[dim[0]] = extent
    return names


def _size(axes: AxisMap, names: dict[Axis, Extent], dim: Dim, domain: Domain | None) -> sympy.Expr:
    product: sympy.Expr = _ONE
    for axis in axes.resolve(dim):
        if axis.role is Role.BATCH:
            product *= 1 if domain else BATCH
        elif axis.role is Role.TOKEN:
            product *= _COUNTS[domain] if domain else TOKENS
        elif axis.order is not None:
            product *= _size(axes, names, axis.order, domain)
        elif axis.sum is not None:
            product *= sympy.Add(*(_size(axes, names, term, domain) for term in axis.sum))
        elif axis in names:
            name = str(names[axis])
            product *= (
                HISTORY if name == "history" else sympy.Symbol(name, positive=True, integer=True)
            )
        else:
            product *= axis.size
    return product
