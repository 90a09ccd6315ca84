"""What sizes are called: axis labels -> names, graph arguments and generic numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch.fx import Node

from focus_compile.axes.axes import Axis, AxisMap, Dim, Role
from focus_compile.capture.computed_masks import makes_mask
from focus_compile.errors import Unsupported
from focus_compile.graph.nodes import aten, expr_of
from focus_compile.graph.replay import Replay
from focus_compile.graph.sizes import Extent, generic
from focus_compile.refusals import (
    CACHE_CUT,
    CHANGES_LENGTH,
    FOLDED_INPUT,
    MAKES_MASK,
    NO_RULE,
    NO_SIZE,
    SIZE_FORM,
    SIZE_MEANING,
)

__all__ = ["Sizes", "is_tensor"]

_NAMES = {Role.BATCH: "batch", Role.TOKEN: "token"}


@dataclass
class Sizes:
    """Sizes of a captured graph, as those of the canonical graph that ``replay`` builds.

    Attributes:
        names: what each axis is called; meaning: and each symbol of Dynamo's; reads: the input and
            dim that a name is read off; histories: the name of a history by its captured length;
            numbers: symbols that are no size, as inputs without dims; inputs_named: whether every
            input has its names.
    """

    axes: AxisMap
    replay: Replay
    names: dict[Axis, Extent] = field(default_factory=dict)
    meaning: dict[sympy.Symbol, Extent | None] = field(default_factory=dict)
    reads: dict[str, tuple[Node, int]] = field(default_factory=dict)
    histories: dict[sympy.Expr, Extent] = field(default_factory=dict)
    numbers: dict[sympy.Symbol, Node] = field(default_factory=dict)
    inputs_named: bool = False

    def name(self, axis: Axis) -> Extent:
        """The extent of an axis that is not a sum."""
        if axis not in self.names:
            size = self.axes.expr(axis.size)
            if axis.role is not None:
                self.names[axis] = _NAMES[axis.role]
            elif size.is_Integer:
                self.names[axis] = int(size)
            elif (known := self._named(size)) is not None:
                self.names[axis] = known
            else:
                self.names[axis] = f"extra{len(self.names)}"
        return self.names[axis]

    def is_known(self, axis: Axis) -> bool:
        """Whether the size of an axis that is no sum has a name, or is a sum of such."""
        name = self.name(axis)
        return isinstance(name, tuple) or name in self.reads

    def _named(self, size: sympy.Expr) -> Extent | None:
        """A size of something that the model makes, by the names of inputs' sizes; None: unknown.

        Inputs have their names before: no two of them share one because they are as long.
        """
        if not self.inputs_named:
            return None
        if size.is_Integer:
            return int(size)
        if size.is_Add:
            terms = tuple(self._named(term) for term in size.args)
            return None if None in terms else terms
        return self.meaning.get(size)

    def extent(self, dim: Dim) -> Extent:
        """The extent of a dim of an input."""
        number, named = 1, list[Extent]()
        for axis in self.axes.resolve(dim):
            extent = self.name(axis) if axis.sum is None else self._total(axis.sum)
            if isinstance(extent, int):
                number *= extent
            else:
                named.append(extent)
        if not named:
            return number
        if number != 1 or len(named) != 1:
            raise Unsupported(FOLDED_INPUT, self.axes.current)
        return named[0]

    def _total(self, terms: tuple[Dim, ...]) -> Extent:
        extents = tuple(self.extent(term) for term in terms)
        return sum(extents) if all(isinstance(extent, int) for extent in extents) else extents  # type: ignore

    def argument(self, extent: Extent) -> Node | int:
        """An extent as a graph argument: read off an input."""
        if isinstance(extent, int):
            return extent
        if isinstance(extent, tuple):
            return self.replay.total(*(self.argument(term) for term in extent))
        if extent not in self.reads:
            node = self.axes.current
            if node is not None and makes_mask(node):
                raise Unsupported(MAKES_MASK, node)
            if extent in self.histories.values():
                raise Unsupported(CACHE_CUT, node)
            raise Unsupported(NO_SIZE, node, extent=extent)
        return self.replay.size(*self.reads[extent])

    def size(self, dim: Dim) -> Node | int:
        """The size of a dim as a graph argument."""
        return self.replay.product(*(self._size(axis) for axis in self.axes.resolve(dim)))

    def _size(self, axis: Axis) -> Node | int:
        if axis.order is not None:
            return self.size(axis.order)
        if axis.sum is not None:
            return self.replay.total(*(self.size(term) for term in axis.sum))
        return self.argument(self.name(axis))

    def number(self, dim: Dim) -> int:
        """The generic number for the size of a dim."""
        product = 1
        for axis in self.axes.resolve(dim):
            if axis.order is not None:
                product *= self.number(axis.order)
            elif axis.sum is not None:
                product *= sum(self.number(term) for term in axis.sum)
            else:
                product *= generic(self.name(axis))
        return product

    def position(self, expr: sympy.Expr, node: Node) -> Node | int:
        """Where something starts, as a graph argument.

        A number that is the length of a history when the graph is captured is that length: the
        graph runs only where its guards hold, and there the two are the same.
        """
        expr = self.axes.expr(expr)
        if expr in self.histories:
            return self.argument(self.histories[expr])
        return self.value(expr, node)

    def value(self, expr: sympy.Expr, node: Node) -> Node | int:
        """A number computed by the captured graph, as an operand: of sizes, and of numbers that
        the model is called with, which are tensors without dims.
        """
        total: Node | int = 0
        for term in sympy.Add.make_args(expr):
            factor, symbol = term.as_coeff_Mul()
            if symbol not in self.numbers:
                total = self._plus(total, self.expression(term, node))
                continue
            number = self.numbers[symbol]
            if factor != 1:
                number = self.replay.once(aten.mul.Tensor, (number, int(factor)))
            total = self._plus(total, number)
        return total

    def _plus(self, left: Node | int, right: Node | int) -> Node | int:
        parts = [part for part in (left, right) if part != 0]
        tensors = [part for part in parts if is_tensor(part)]
        if len(parts) < 2 or not tensors:
            return self.replay.total(*parts)
        others = [part for part in parts if part is not tensors[0]]
        return self.replay.once(aten.add.Tensor, (tensors[0], *others))

    def number_of(self, arg: Node, node: Node) -> Any:
        """A number that the captured graph computes, as a graph argument."""
        number = arg.meta["val"]
        if isinstance(number, torch.SymFloat):
            return float(number)  # a constant of the module: Dynamo guards that it stays so
        return (
            self.expression(expr_of(number), node) if isinstance(number, torch.SymInt) else number
        )

    def expression(self, expr: sympy.Expr, node: Node) -> Node | int:
        """A size computed by the captured graph, as a graph argument."""
        if expr.is_Integer:
            return int(expr)
        if expr.is_Symbol:
            extent = self.meaning.get(expr)
            if extent is None:
                raise Unsupported(SIZE_MEANING, node, size=expr)
            return self.argument(extent)
        operands = [self.expression(operand, node) for operand in expr.args]
        if expr.is_Add:
            return self.replay.total(*operands)
        if expr.is_Mul:
            return self.replay.product(*operands)
        raise Unsupported(SIZE_FORM, node, size=expr)

    def check(self, node: Node, value: Any) -> None:
        """Refuse an operator whose result is not as long as its labels say."""
        results = [value] if isinstance(value, torch.Tensor) else value
        for dims, result in zip(self.axes.dims[node], results, strict=True):
            if [self.number(dim) for dim in dims] != list(result.shape):
                if makes_mask(node):
                    raise Unsupported(MAKES_MASK, node)
                if node in self.axes.unruled:
                    raise Unsupported(NO_RULE, node)
                raise Unsupported(CHANGES_LENGTH, node)


def is_tensor(value: Any) -> bool:
    return isinstance(value, Node) and isinstance(value.meta["val"], torch.Tensor)
