"""Transfer rules for tokens sorted by expert: a mixture of experts is token-wise as a whole.

    ids, order = sort(expert of every (token, choice))        rows[j] = x[order[j] // choices]
    counts = histc(ids); ends = cumsum(counts)                grouped_mm(rows, weights, ends)
    back[order] = arange                                      out[back]: tokens in their own order

A sorted list is an axis of its own, with the axes that it is an order of. Row by row it can be
computed for any set of tokens, as long as everything that reads it keeps to that order and the
numbers of rows per expert are those of the same list. What values *mean* is followed for that:
positions of tokens in their own order, sorted ids, counts per expert. Anything else that mixes
rows of such a list is refused as mixing tokens.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import transformers.integrations.moe  # noqa: F401  registers its operators
from torch.fx import Node

from focus_compile.axes.axes import Axis, AxisMap, Dim, Meaning, Quantity, Transfer
from focus_compile.axes.rules.table import fresh, transfer
from focus_compile.graph.nodes import argument, aten, operands, tensor_of, wrap
from focus_compile.ops.library import focus

__all__ = ["GROUPED", "meaning_of"]

SORTS = (aten.sort.default, aten.sort.stable)
ARGSORTS = (aten.argsort.default, aten.argsort.stable)
CASTS = (
    aten.to.dtype, aten.to.device, aten._to_copy.default, aten.clone.default, aten.alias.default,
    aten.contiguous.default, aten.view.default, aten.reshape.default,
)  # fmt: skip
DIVISIONS = (aten.floor_divide.default, aten.div.Tensor_mode, aten.div.Scalar_mode)


GROUPED: tuple[Any, ...] = (
    aten._grouped_mm.default,
    torch.ops.transformers.grouped_mm_fallback.default,
)
"""``grouped_mm`` operators: rows, weights per expert, the end of each expert's rows."""


def _sorted_dim(node: Node) -> int:
    positions = {aten.sort.default: 1, aten.sort.stable: 2}
    positions |= {aten.argsort.default: 1, aten.argsort.stable: 2}
    dim: int = argument(node, positions[node.target], "dim", -1)  # type: ignore[index]
    return dim


@transfer(*SORTS, *ARGSORTS)
def _sort(node: Node, axes: AxisMap) -> Transfer:
    """Features in order, or, of a list, the rows in order."""
    source = operands(node)[0]
    dims = axes.dims[source][0]
    result_count = 2 if node.target in SORTS else 1
    if len(dims) != 1:
        return Transfer((dims,) * result_count, (dims[wrap(_sorted_dim(node), len(dims))],))
    meaning = axes.meaning.get(source)
    if (
        result_count == 1
        and meaning is not None
        and meaning.quantity is Quantity.POSITION
        and _is_order(dims[0], axes)
    ):
        return Transfer(((meaning.dim,),))  # the order of an order is its inverse
    return Transfer((((Axis(axes.size(dims[0]), order=dims[0]),),),) * result_count)


def _is_order(dim: Dim, axes: AxisMap) -> bool:
    axis = axes.resolve(dim)
    return len(axis) == 1 and axis[0].order is not None


@transfer(aten.index.Tensor)
def _index(node: Node, axes: AxisMap) -> Transfer:
    """``x[:, ..., index]`` with one index; several would broadcast and move dims."""
    x, indices = _arguments(node)[:2]
    dims = axes.dims[x][0]
    (dim, index), *more_indices = [
        (dim, index) for dim, index in enumerate(indices) if index is not None
    ]
    if more_indices or tensor_of(index).dtype == torch.bool:
        return Transfer(fresh(node, axes), dims)
    picked = axes.dims[index][0]
    out = (*dims[:dim], *picked, *dims[dim + 1 :])
    meaning = axes.meaning.get(index)
    if len(picked) == 1 and _is_row_index(meaning, picked[0], axes):
        assert meaning is not None
        return Transfer((out,), () if _same_axes(meaning.dim, dims[dim], axes) else (dims[dim],))
    return Transfer((out,), (dims[dim],))


def _is_row_index(meaning: Meaning | None, picked: Dim, axes: AxisMap) -> bool:
    """Whether integers are positions that were found by sorting.

    Those of an ``arange`` over tokens are positions on the canvas, which packed rows are not at.
    """
    if meaning is None or meaning.quantity is not Quantity.POSITION:
        return False
    return axes.listed(picked) or axes.listed(meaning.dim)


def _arguments(node: Node) -> tuple[Any, ...]:
    return node.args


def _same_axes(left: Dim, right: Dim, axes: AxisMap) -> bool:
    return axes.resolve(left) == axes.resolve(right)


@transfer(aten.index_put.default)
def _index_put(node: Node, axes: AxisMap) -> Transfer:
    """``x[order] = rows``: rows of a sorted list back in their own order."""
    x, indices, values = _arguments(node)[:3]
    (index, *more_indices), dims = indices, axes.dims[x][0]
    meaning = None if more_indices or index is None else axes.meaning.get(index)
    by_position = (
        meaning is not None
        and meaning.quantity is Quantity.POSITION
        and not argument(node, 3, "accumulate")
    )
    if not by_position or not _is_order(axes.dims[index][0][0], axes):
        return Transfer(fresh(node, axes), (*dims, *axes.dims[values][0]))
    assert meaning is not None
    (axis,) = axes.resolve(axes.dims[index][0][0])
    assert axis.order is not None
    rows, *features = axes.dims[values][0]
    axes.unify(rows, (axis,))
    if not _same_axes(axis.order, meaning.dim, axes):
        return Transfer(fresh(node, axes), (*dims, rows))
    return Transfer(((meaning.dim, *features),))


@transfer(aten.index_add.default)
def _index_add(node: Node, axes: AxisMap) -> Transfer:
    """``x.index_add(0, token, rows)``: the rows of a sorted list added up per token."""
    x, index, rows = operands(node)
    dims, (picked,) = axes.dims[x][0], axes.dims[index][0]
    meaning = axes.meaning.get(index)
    if node.args[1] != 0:
        return Transfer(fresh(node, axes), (*dims, *axes.dims[rows][0]))
    for index_or_dim, row_dim in zip((picked, *dims[1:]), axes.dims[rows][0], strict=True):
        axes.unify(index_or_dim, row_dim)
    if not _is_row_index(meaning, picked, axes):
        return Transfer((dims,), (dims[0], picked))
    assert meaning is not None
    axes.unify(dims[0], meaning.dim)
    return Transfer((dims,))


@transfer(aten.histc.default, aten.bincount.default)
def _count(node: Node, axes: AxisMap) -> Transfer:
    """How many rows of a sorted list each expert has."""
    source = operands(node)[0]
    meaning = axes.meaning.get(source)
    listed = meaning is not None and meaning.quantity is Quantity.SORTED_ID
    return Transfer(fresh(node, axes), () if listed else axes.dims[source][0])


@transfer(*GROUPED)
def _grouped_mm(node: Node, axes: AxisMap) -> Transfer:
    rows, weights, ends = operands(node)[:3]
    (list_, inner), weight = axes.dims[rows][0], axes.dims[weights][0]
    meaning = axes.meaning.get(ends)
    ends_match = (
        meaning is not None
        and meaning.quantity is Quantity.END
        and _same_axes(meaning.dim, list_, axes)
    )
    mixed = (inner, *weight)
    return Transfer(((list_, weight[-1]),), mixed if ends_match else (*mixed, list_))


@transfer(focus.experts.default)
def _experts(node: Node, axes: AxisMap) -> Transfer:
    """Token by token: rows, ids and shares are of the same tokens."""
    rows, *chosen = (axes.dims[operand][0] for operand in operands(node)[:3])
    for tokens, _ in chosen:
        axes.unify(rows[0], tokens)
    return Transfer((rows,), (rows[1], *(choices for _, choices in chosen)))


def meaning_of(node: Node, axes: AxisMap) -> Meaning | None:
    """What the values of a node mean, by those of its operands."""
    target: Any = node.target
    if len(axes.dims[node][0]) != 1 or target not in _MEANINGS:
        return None
    return _MEANINGS[target](node, axes)


def _operand_meaning(node: Node, axes: AxisMap, position: int = 0) -> Meaning | None:
    """What an operand means."""
    source = node.args[position]
    return axes.meaning.get(source) if isinstance(source, Node) else None


def _of_arange(node: Node, axes: AxisMap) -> Meaning | None:
    return (
        Meaning(Quantity.POSITION, axes.dims[node][0][0]) if node.args[:-1] in ((), (0,)) else None
    )


def _of_sort(node: Node, axes: AxisMap) -> Meaning | None:
    """Of a result of ``sort``: ids, or positions."""
    source, index = node.args
    assert isinstance(source, Node)
    return (
        _listed(axes.dims[node][0][0], bool(index == 1), axes) if source.target in SORTS else None
    )


def _of_argsort(node: Node, axes: AxisMap) -> Meaning | None:
    result_dim = axes.dims[node][0][0]
    if _is_order(result_dim, axes):
        return _listed(result_dim, True, axes)
    source = node.args[0]
    assert isinstance(source, Node)
    return Meaning(Quantity.POSITION, axes.dims[source][0][0])


def _listed(list_: Dim, positions: bool, axes: AxisMap) -> Meaning:
    (axis,) = axes.resolve(list_)
    assert axis.order is not None
    return (
        Meaning(Quantity.POSITION, axis.order) if positions else Meaning(Quantity.SORTED_ID, list_)
    )


def _of_count(node: Node, axes: AxisMap) -> Meaning | None:
    meaning = _operand_meaning(node, axes)
    return (
        Meaning(Quantity.COUNT, meaning.dim)
        if meaning is not None and meaning.quantity is Quantity.SORTED_ID
        else None
    )


def _of_running_total(node: Node, axes: AxisMap) -> Meaning | None:
    meaning = _operand_meaning(node, axes)
    return (
        Meaning(Quantity.END, meaning.dim)
        if meaning is not None and meaning.quantity is Quantity.COUNT
        else None
    )


def _of_division(node: Node, axes: AxisMap) -> Meaning | None:
    """Positions of (token, choice), divided by the number of choices: positions of tokens."""
    meaning, divisor = _operand_meaning(node, axes), node.args[1]
    floor = node.target is aten.floor_divide.default or node.kwargs["rounding_mode"] == "floor"
    if meaning is None or meaning.quantity is not Quantity.POSITION or not floor:
        return None
    *leading, last = axes.resolve(meaning.dim)
    by_choices = isinstance(divisor, int) and axes.expr(last.size) == divisor
    return Meaning(Quantity.POSITION, tuple(leading)) if by_choices else None


_MEANINGS: dict[Any, Callable[[Node, AxisMap], Meaning | None]] = {
    operator.getitem: _of_sort,
    aten.arange.default: _of_arange,
    aten.arange.start: _of_arange,
    aten.index_put.default: lambda node, axes: _operand_meaning(node, axes, 2),
    aten.cumsum.default: _of_running_total,
    **dict.fromkeys(ARGSORTS, _of_argsort),
    **dict.fromkeys((aten.histc.default, aten.bincount.default), _of_count),
    **dict.fromkeys(CASTS, _operand_meaning),
    **dict.fromkeys(DIVISIONS, _of_division),
}
