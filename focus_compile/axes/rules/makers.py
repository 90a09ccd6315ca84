"""Transfer rules of operators that make a tensor: of one number, of positions, or a triangle."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch.fx import Node

from focus_compile.axes.axes import AxisMap, Dim, Transfer
from focus_compile.axes.rules.table import ARANGES, fresh, one_result, source, transfer
from focus_compile.graph.nodes import argument, aten, tensor_of
from focus_compile.torch_private import OpOverload

__all__ = ["FILLS"]


def _number(position: int) -> Callable[[Node], Any]:
    return lambda node: argument(node, position, "fill_value")


def _always(number: int) -> Callable[[Node], Any]:
    return lambda _: number


_LIKE: dict[OpOverload, Callable[[Node], Any]] = {
    aten.zeros_like.default: _always(0),
    aten.ones_like.default: _always(1),
    aten.full_like.default: _number(1),
    aten.empty_like.default: _always(0),
    aten.fill.Scalar: lambda node: argument(node, 1, "value"),
    aten.zero.default: _always(0),
}
_SIZED: dict[OpOverload, Callable[[Node], Any]] = {
    aten.zeros.default: _always(0),
    aten.ones.default: _always(1),
    aten.full.default: _number(1),
    aten.empty.memory_format: _always(0),
    aten.new_zeros.default: _always(0),
    aten.new_ones.default: _always(1),
    aten.new_full.default: _number(2),
    aten.new_empty.default: _always(0),
}
FILLS = _LIKE | _SIZED
"""Operators that fill a new tensor with one number, and which. One that says it makes no values
to speak of makes 0: whoever reads them before they are written may get anything."""


@transfer(*_LIKE)
def _like(node: Node, axes: AxisMap) -> Transfer:
    """The axes of another value, of which nothing else is read."""
    return one_result(*axes.dims[source(node)][0])


@transfer(*_SIZED)
def _sized(node: Node, axes: AxisMap) -> Transfer:
    """Axes whose sizes were read off values, or their own: later operators tell which ones."""
    target: Any = node.target
    sizes = argument(node, int(target.__name__.startswith("new_")), "size")
    dims = [_read(size, axes) for size in sizes]
    own = (axes.fresh(number) for number in tensor_of(node).shape)
    return one_result(*(new if dim is None else dim for dim, new in zip(dims, own, strict=True)))


def _read(size: Any, axes: AxisMap) -> Dim | None:
    """The dim, or the product or sum of dims, whose size a graph's argument is; None: unknown."""
    if isinstance(size, int):
        return axes.fresh(size)
    if size.target is aten.sym_size.int:
        value, at = size.args
        return axes.dims[value][0][at]
    if size.target not in (operator.add, operator.mul):
        return None
    left, right = (_read(part, axes) for part in size.args)
    if left is None or right is None:
        return None
    if size.target is operator.mul:
        return left + right
    (joined,) = axes.fresh(size.meta["val"])
    joined.sum = (left, right)
    return (joined,)


@transfer(*ARANGES, aten.eye.default, aten.eye.m)
def _counted(node: Node, axes: AxisMap) -> Transfer:
    """Axes of their own, until an elementwise operator tells which ones they are."""
    return Transfer(fresh(node, axes))


@transfer(aten.tril.default, aten.triu.default)
def _triangle(node: Node, axes: AxisMap) -> Transfer:
    """What is left depends on where it stands in the last two dims."""
    dims = axes.dims[source(node)][0]
    return one_result(*dims, mixed=dims[-2:])
