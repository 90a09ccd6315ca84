"""Values that are put into a part of a tensor: the tensor, its places, the values.

What is put into a view of a tensor is put into the tensor itself, where that can be told.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch.fx import Node

from focus_compile.capture.edits import Edit
from focus_compile.graph.nodes import aten, expr_of, tensor_of, wrap

__all__ = ["Put", "emit", "only_long", "put_of", "through", "under_view"]


@dataclass(frozen=True)
class Put:
    """Values that are put into a part of a tensor.

    ``index``: int64, their places in ``x`` along ``dim``: ``[T]``, or ``[B, T]`` where they differ
    from row to row along the dim ``row``. ``source``: shaped as ``x``, T long along ``dim``.
    ``views``: those of ``x`` that the call returns a view through, the last one first.
    """

    x: Node
    dim: int
    index: Node
    source: Node
    in_place: bool
    row: int | None = None
    views: tuple[Node, ...] = ()


def emit(put: Put, edit: Edit) -> Node:
    """The call in one of two forms, which :func:`put_of` reads."""
    x, source, index = put.x, put.source, put.index
    if tensor_of(source).dtype != tensor_of(x).dtype:
        source = edit.call(aten.to.dtype, source, tensor_of(x).dtype)
    if tensor_of(index).dtype != torch.int64:
        index = edit.call(aten.to.dtype, index, torch.int64)
    if put.row is None:
        target = aten.index_copy_.default if put.in_place else aten.index_copy.default
        return edit.call(target, x, put.dim, index, source)
    if put.row > put.dim:
        index = edit.call(aten.transpose.int, index, 0, 1)
    sizes: list[Any] = [1] * tensor_of(x).dim()
    for at, size in zip(sorted((put.row, put.dim)), edit.sizes(index), strict=True):
        sizes[at] = size
    full = edit.call(aten.view.default, index, sizes)
    full = edit.call(aten.expand.default, full, edit.sizes(source))
    target = aten.scatter_.src if put.in_place else aten.scatter.src
    return edit.call(target, x, put.dim, full, source)


def put_of(node: Node) -> Put | None:
    """What a node of one of the two forms, without the underscore, puts where."""
    if node.target is aten.index_copy.default:
        x, dim, index, source = node.args
        return Put(x, wrap(dim, tensor_of(x).dim()), index, source, False)  # type: ignore
    if node.target is not aten.scatter.src:
        return None
    x, dim, full, source = node.args
    assert isinstance(x, Node) and isinstance(full, Node) and isinstance(source, Node)
    spread = full.args[0] if full.target is aten.expand.default else None
    if not isinstance(spread, Node) or spread.target is not aten.view.default:
        return None
    dim = wrap(dim, tensor_of(x).dim())  # type: ignore[arg-type]
    index, row = spread.args[0], only_long(spread, dim)
    if not isinstance(index, Node) or tensor_of(index).dim() != 2 or row is None or row > dim:
        return None
    return Put(x, dim, index, source, False, row)


def only_long(index: Node, dim: int) -> int | None:
    """The one dim beside ``dim`` that has more than one element; None: there is not one."""
    found = [at for at, size in enumerate(tensor_of(index).shape) if at != dim and size != 1]
    return found[0] if len(found) == 1 else None


def under_view(put: Put, edit: Edit) -> Put | None:
    """A put into a view, as one into what it is a view of; None: it is none, or not understood."""
    rows = () if put.row is None else (put.row,)
    found = through(put.x, put.source, (put.dim, *rows), edit)
    if found is None:
        return None
    source, (dim, *row) = found
    base: Any = put.x.args[0]
    views = (*put.views, put.x)
    return replace(put, x=base, dim=dim, source=source, row=row[0] if row else None, views=views)


def through(
    view: Node, source: Node, dims: tuple[int, ...], edit: Edit
) -> tuple[Node, tuple[int, ...]] | None:
    """Values laid out as what ``view`` is a view of, and where dims of the view are in it.

    ``source``: laid out as the view; along ``dims`` it may have another length.
    """
    base: Any = view.args[0] if view.args else None
    if view.target in (aten.alias.default, aten.detach.default):
        return source, dims
    if view.target is aten.transpose.int:
        rank = tensor_of(view).dim()
        first, second = (wrap(at, rank) for at in view.args[1:])  # type: ignore[arg-type]
        swapped = {first: second, second: first}
        source = edit.call(aten.transpose.int, source, first, second)
        return source, tuple(swapped.get(dim, dim) for dim in dims)
    if view.target is aten.permute.default:
        order = [wrap(at, tensor_of(view).dim()) for at in view.args[1]]  # type: ignore
        back = [order.index(at) for at in range(len(order))]
        return edit.call(aten.permute.default, source, back), tuple(order[dim] for dim in dims)
    if view.target is aten.unsqueeze.default:
        at = wrap(view.args[1], tensor_of(view).dim())  # type: ignore[arg-type]
        if at in dims:
            return None
        return edit.call(aten.squeeze.dim, source, at), tuple(d - (d > at) for d in dims)
    if view.target is aten.squeeze.dim and tensor_of(view).dim() < tensor_of(base).dim():
        at = wrap(view.args[1], tensor_of(base).dim())  # type: ignore[arg-type]
        return edit.call(aten.unsqueeze.default, source, at), tuple(d + (d >= at) for d in dims)
    if view.target in (aten.view.default, aten.unflatten.int):
        return _reshaped(view, source, dims, edit)
    return None


def _reshaped(
    view: Node, source: Node, dims: tuple[int, ...], edit: Edit
) -> tuple[Node, tuple[int, ...]] | None:
    base: Any = view.args[0]
    sizes, places = edit.sizes(base), list[int]()
    for dim in dims:
        place = _place(base, view, dim)
        if place is None:
            return None
        sizes[place] = edit.size(source, dim)
        places.append(place)
    return edit.call(aten.reshape.default, source, sizes), tuple(places)


def _place(base: Node, view: Node, dim: int) -> int | None:
    """Which dim of ``base`` a dim of its reshaped view is; None: a part or a product of some."""
    outer, inner = ([expr_of(size) for size in tensor_of(value).shape] for value in (view, base))
    before = sympy.Mul(*outer[:dim])
    places = [
        at
        for at, size in enumerate(inner)
        if size == outer[dim] and sympy.Mul(*inner[:at]) == before
    ]
    return places[0] if len(places) == 1 else None
