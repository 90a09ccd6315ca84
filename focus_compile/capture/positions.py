"""Positions in a canonical graph: ``arange``, and windows of tables by position."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from focus_compile.capture.names import Sizes
from focus_compile.graph.nodes import argument, expr_of, tensor_of

__all__ = ["arange", "is_window", "progression", "window"]

aten = torch.ops.aten


def progression(args: tuple[Any, ...]) -> tuple[Any, Any]:
    """Start and step of an ``arange``."""
    return (0 if len(args) == 1 else args[0]), (args[2] if len(args) == 3 else 1)


def arange(node: Node, start: Any, step: Any, sizes: Sizes) -> Node:
    """``arange`` as long as its label says."""
    (dim,) = sizes.axes.of(node)
    kwargs = dict(node.kwargs) | {"dtype": tensor_of(node).dtype}
    # every list of tokens is an axis of its own, even where two are as long
    make = sizes.replay.call if sizes.axes.listed(dim) else sizes.replay.once
    positions = make(aten.arange.default, (sizes.size(dim),), kwargs, like=node)
    if step != 1:
        positions = sizes.replay.once(aten.mul.Tensor, (positions, step), like=node)
    if start != 0:
        positions = sizes.replay.once(aten.add.Tensor, (positions, start), like=node)
    sizes.check(node, positions.meta["val"])
    return positions


def is_window(node: Node, sizes: Sizes) -> bool:
    """Whether a slice is as long as an axis with a name: its bounds depend on sizes."""
    if node.target is not aten.slice.Tensor:
        return False
    dim = sizes.axes.of(node)[_sliced(node)]
    return any(
        axis.role is not None or axis.sum is not None or sizes.is_known(axis)
        for axis in sizes.axes.resolve(dim)
    )


def _sliced(node: Node) -> int:
    return int(argument(node, 1, "dim", 0)) % tensor_of(node).dim()


def window(node: Node, source: Node, sizes: Sizes) -> Node:
    """A slice as long as its label says: of a table by position, or of the keys' axis.

    Rows are picked instead of sliced: a table is as long as the model's longest text, which no
    generic number fits.
    """
    at = _sliced(node)
    start: Any = argument(node, 2, "start", 0) or 0
    start = expr_of(start.meta["val"] if isinstance(start, Node) else start)
    if start.is_negative:
        start += expr_of(tensor_of(_operand(node)).shape[at])
    size = sizes.size(sizes.axes.of(node)[at])
    kwargs = {"device": tensor_of(node).device}
    rows = sizes.replay.once(aten.arange.default, (size,), kwargs, like=node)
    offset = sizes.position(start, node)
    if offset != 0:
        rows = sizes.replay.once(aten.add.Tensor, (rows, offset), like=node)
    picked = sizes.replay.once(aten.index_select.default, (source, at, rows), like=node)
    sizes.check(node, picked.meta["val"])
    return picked


def _operand(node: Node) -> Node:
    source = node.args[0]
    assert isinstance(source, Node)
    return source
