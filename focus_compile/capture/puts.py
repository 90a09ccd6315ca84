"""The ways in which models put values into a part of a tensor -> one operator.

x[:, :, a:b] = k, x.narrow(2, a, b - a).copy_(k)   ->   x.index_copy_(2, arange(a, b), k)
x[:, :, index] = k, x.scatter_(2, index_BHTD, k)        x.index_copy_(2, index, k)
x[rows, :, index_BT] = k                           ->   x.scatter_(2, index_B1T1.expand(...), k)

Likewise those that return a new tensor: ``slice_scatter``, ``scatter``, ``index_put``, and a
``cat`` of the values with what is left of x. What is put into a view of a tensor
(``x.transpose(1, 2)``) is put into the tensor itself. So two forms are left: one for the places of
all rows, one per row.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.fx import GraphModule, Node

from focus_compile.capture.edits import Edit
from focus_compile.capture.functional import aliased
from focus_compile.capture.put import Put, emit, only_long, through, under_view
from focus_compile.graph.nodes import argument, aten, cat_parts, expr_of, tensor_of, wrap

__all__ = ["name_puts"]


def name_puts(gm: GraphModule) -> None:
    """Rewrite a graph in place; what is not understood stays as it is."""
    for node in list(gm.graph.nodes):
        read = _READERS.get(node.target)
        edit = Edit(gm, node)
        put = None if read is None else read(node, edit)
        if put is None:
            continue
        while (deeper := under_view(put, edit)) is not None:
            put = deeper
        result = emit(put, edit)
        if node.users:
            for view in reversed(put.views):
                result = edit.again(view, result)
            node.replace_all_uses_with(result)
        gm.graph.erase_node(node)
    gm.graph.eliminate_dead_code()
    gm.recompile()


# -- slices ----------------------------------------------------------------------------------------


def _copied(node: Node, edit: Edit) -> Put | None:
    """``x[:, :, a:b].copy_(source)``; there may be views of the slice."""
    written, source = node.args[:2]
    assert isinstance(written, Node)
    if not isinstance(source, Node):
        return None
    source, views, view = edit.fitted(source, edit.sizes(written)), [], written
    while view.target is not aten.slice.Tensor:
        under = through(view, source, (), edit)
        if under is None:
            return None
        views.append(view)
        (source, _), view = under, view.args[0]  # type: ignore[assignment]
    if argument(view, 4, "step", 1) != 1:
        return None
    span = argument(view, 2, "start"), argument(view, 3, "end")
    x, dim = view.args[0], argument(view, 1, "dim", 0)
    put = _span(x, dim, span, source, True, edit)  # type: ignore[arg-type]
    return None if put is None else replace(put, views=(*views, view))


def _slice_scattered(node: Node, edit: Edit) -> Put | None:
    x, source = node.args[:2]
    if argument(node, 5, "step", 1) != 1:
        return None
    span = argument(node, 3, "start"), argument(node, 4, "end")
    return _span(x, argument(node, 2, "dim", 0), span, source, False, edit)  # type: ignore


def _joined(node: Node, edit: Edit) -> Put | None:
    """``cat([x[..., :a], source, x[..., b:]])``, as long as x; one of the slices may be missing."""
    parts, at = cat_parts(node), argument(node, 1, "dim", 0)
    at = wrap(at, tensor_of(node).dim())
    sources = [n for n, part in enumerate(parts) if not _is_left(part, at)]
    if len(sources) != 1 or len(parts) not in (2, 3):
        return None
    (middle,) = sources
    before, after = parts[:middle], parts[middle + 1 :]
    left = {part.args[0] for part in before + after}
    if len(left) != 1 or max(len(before), len(after)) > 1:
        return None
    (x,) = left
    start = argument(before[0], 3, "end") if before else 0
    whole = expr_of(tensor_of(x).shape[at]) == expr_of(tensor_of(node).shape[at])  # type: ignore
    first = all(argument(part, 2, "start") in (None, 0) for part in before)
    last = all(argument(part, 3, "end") in (None, sys.maxsize) for part in after)
    counted = _number(start).is_negative is not True
    if not (whole and first and last and counted and _is_input(x)):  # type: ignore[arg-type]
        return None
    return _span(x, at, (start, None), parts[middle], False, edit)  # type: ignore[arg-type]


def _is_left(part: Node, dim: int) -> bool:
    rank = tensor_of(part).dim()
    return (
        part.target is aten.slice.Tensor
        and wrap(argument(part, 1, "dim", 0), rank) == dim
        and argument(part, 4, "step", 1) == 1
        and _is_input(part.args[0])  # type: ignore[arg-type]
    )


def _span(
    x: Node, dim: int, span: tuple[Any, Any], source: Node, in_place: bool, edit: Edit
) -> Put | None:
    """Neighbouring places, of the first and the one after the last; these may be None."""
    dim = wrap(dim, tensor_of(x).dim())
    start, end = span
    start = 0 if start is None else start
    length = edit.size(source, dim)
    if _number(start).is_negative:  # no more than x has, or a slice would be cut short
        counted = 0 if end in (None, sys.maxsize) else _number(end)
        if counted - _number(start) != _number(length):
            return None
        start = edit.total(start, edit.size(x, dim))
    device = tensor_of(x).device
    index = edit.call(aten.arange.start, start, edit.total(start, length), device=device)
    return Put(x, dim, index, source, in_place)


def _number(value: Any) -> Any:
    return expr_of(value.meta["val"] if isinstance(value, Node) else value)


# -- places ----------------------------------------------------------------------------------------


def _index_copied(node: Node, _: Edit) -> Put | None:
    x, dim, index, source = node.args
    in_place = node.target is aten.index_copy_.default
    if aliased(x) is None or tensor_of(index).dim() != 1:  # type: ignore[arg-type]
        return None
    return Put(x, wrap(dim, tensor_of(x).dim()), index, source, in_place)  # type: ignore


def _scattered(node: Node, edit: Edit) -> Put | None:
    """``x.scatter_(dim, index, source)``, where ``index`` is the same along other dims."""
    x, dim, full, source = node.args
    assert isinstance(x, Node) and isinstance(full, Node) and isinstance(source, Node)
    dim = wrap(dim, tensor_of(x).dim())  # type: ignore[arg-type]
    sizes = [[expr_of(size) for size in tensor_of(value).shape] for value in (x, full, source)]
    wanted = [mine if at == dim else of_x for at, (of_x, mine) in enumerate(zip(*sizes[:2]))]  # noqa: B905
    if not _is_input(x) or sizes[1] != sizes[2] or sizes[1] != wanted:
        return None
    index = _spread(full)
    lead = tensor_of(full).dim() - tensor_of(index).dim()
    for _ in range(lead):
        index = edit.call(aten.unsqueeze.default, index, 0)
    if expr_of(tensor_of(index).shape[dim]) != sizes[1][dim]:
        return None
    row, rank = only_long(index, dim), tensor_of(index).dim()
    if row is None and any(n != 1 for at, n in enumerate(tensor_of(index).shape) if at != dim):
        return None
    index = edit.squeezed(index, [at for at in range(rank) if at not in (dim, row)])
    if row is not None and row > dim:
        index = edit.call(aten.transpose.int, index, 0, 1)
    return Put(x, dim, index, source, node.target is aten.scatter_.src, row)


_COPIES = (
    aten.expand.default, aten.expand_as.default, aten.repeat.default, aten.contiguous.default,
    aten.clone.default, aten.alias.default, aten.detach.default,
)  # fmt: skip


def _spread(index: Node) -> Node:
    """What an index repeats along dims of one element."""
    while index.target in _COPIES:
        index = index.args[0]  # type: ignore[assignment]
    return index


def _indexed(node: Node, edit: Edit) -> Put | None:
    """``x[:, index] = source`` and ``x[rows, :, index] = source``, where rows are counted."""
    x, indices, source = node.args[:3]
    assert isinstance(x, Node) and isinstance(source, Node)
    given = [(at, index) for at, index in enumerate(indices) if index is not None]  # type: ignore
    if argument(node, 3, "accumulate", False) or not _is_input(x):
        return None
    if any(tensor_of(index).dtype in (torch.bool, torch.uint8) for _, index in given):
        return None
    in_place = node.target is aten.index_put_.default
    if len(given) == 1:
        (dim, index), sizes = given[0], edit.sizes(x)
        longs = [at for at, size in enumerate(tensor_of(index).shape) if size != 1]
        if len(longs) > 1 or not tensor_of(index).dim():
            return None
        others = [at for at in range(tensor_of(index).dim()) if at not in (longs or [0])]
        source = edit.fitted(source, sizes[:dim] + edit.sizes(index) + sizes[dim + 1 :])
        source = edit.squeezed(source, [dim + at for at in others])
        return Put(x, dim, edit.squeezed(index, others), source, in_place)
    for (row, rows), (dim, index) in (given, given[::-1]) if len(given) == 2 else ():
        if _counts(rows, x, row) and tensor_of(index).dim() <= 2:
            return _per_row(Put(x, dim, index, source, in_place, row), edit)
    return None


def _per_row(put: Put, edit: Edit) -> Put | None:
    """Rows and places are indexed together: their dims stand in front, or where both stood."""
    assert put.row is not None
    sizes, row, dim = edit.sizes(put.x), put.row, put.dim
    length, index = edit.size(put.index, -1), put.index
    rest = [at for at in range(len(sizes)) if at not in (row, dim)]
    at = min(row, dim) if abs(row - dim) == 1 else 0
    order = [*rest[:at], row, dim, *rest[at:]]
    source = edit.fitted(put.source, [length if at == dim else sizes[at] for at in order])
    source = edit.call(aten.permute.default, source, [order.index(at) for at in range(len(sizes))])
    same = _spread(index)
    if tensor_of(same).dim() == 1 or tensor_of(same).shape[0] == 1:
        if expr_of(tensor_of(same).shape[-1]) == expr_of(tensor_of(index).shape[-1]):
            index = edit.squeezed(same, list(range(tensor_of(same).dim() - 1)))
    if tensor_of(index).dim() == 1:
        return replace(put, index=index, source=source, row=None)
    if expr_of(tensor_of(index).shape[0]) != expr_of(tensor_of(put.x).shape[row]):
        return None
    return replace(put, index=index, source=source)


def _counts(rows: Node, x: Node, dim: int) -> bool:
    """Whether an index ``[B, 1]``, or that expanded to ``[B, T]``, is 0, 1, ... B - 1."""
    rows = _spread(rows)
    shape = tensor_of(rows).shape
    if len(shape) != 2 or shape[1] != 1 or expr_of(shape[0]) != expr_of(tensor_of(x).shape[dim]):
        return False
    while rows.target in (aten.unsqueeze.default, aten.view.default, aten.reshape.default):
        rows = rows.args[0]  # type: ignore[assignment]
    return rows.target is aten.arange.default or (
        rows.target is aten.arange.start and bool(rows.args[0] == 0)
    )


def _is_input(node: Node) -> bool:
    """Whether the memory of a value is an input's."""
    while (source := aliased(node)) is not None:
        node = source
    return node.op == "placeholder"


_READERS: dict[Any, Callable[[Node, Edit], Put | None]] = {
    aten.copy_.default: _copied,
    aten.slice_scatter.default: _slice_scattered,
    aten.cat.default: _joined,
    aten.index_copy.default: _index_copied,
    aten.index_copy_.default: _index_copied,
    aten.scatter.src: _scattered,
    aten.scatter_.src: _scattered,
    aten.index_put.default: _indexed,
    aten.index_put_.default: _indexed,
}
