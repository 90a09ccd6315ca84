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

from focus_compile.axes.axes import Axis, AxisMap, Dim, Meaning, Transfer
from focus_compile.axes.rules.table import fresh, transfer
from focus_compile.graph.nodes import argument, aten, operands, tensor_of, wrap

__all__ = ["GROUPED", "meaning"]

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
    place = {aten.sort.default: 1, aten.sort.stable: 2}
    place |= {aten.argsort.default: 1, aten.argsort.stable: 2}
    at: int = argument(node, place[node.target], "dim", -1)  # type: ignore[index]
    return at


@transfer(*SORTS, *ARGSORTS)
def _sort(node: Node, axes: AxisMap) -> Transfer:
    """Features in order, or, of a list, the rows in order."""
    source = operands(node)[0]
    dims = axes.dims[source][0]
    results = 2 if node.target in SORTS else 1
    if len(dims) != 1:
        return Transfer((dims,) * results, (dims[wrap(_sorted_dim(node), len(dims))],))
    known = axes.meaning.get(source)
    if results == 1 and known is not None and known.kind == "position" and _is_order(dims[0], axes):
        return Transfer(((known.of,),))  # the order of an order is its inverse
    return Transfer((((Axis(axes.size(dims[0]), order=dims[0]),),),) * results)


def _is_order(dim: Dim, axes: AxisMap) -> bool:
    axis = axes.resolve(dim)
    return len(axis) == 1 and axis[0].order is not None


@transfer(aten.index.Tensor)
def _index(node: Node, axes: AxisMap) -> Transfer:
    """``x[:, ..., index]`` with one index; several would broadcast and move dims."""
    x, indices = _arguments(node)[:2]
    dims = axes.dims[x][0]
    (at, index), *others = [(at, index) for at, index in enumerate(indices) if index is not None]
    if others or tensor_of(index).dtype == torch.bool:
        return Transfer(fresh(node, axes), dims)
    picked = axes.dims[index][0]
    out = (*dims[:at], *picked, *dims[at + 1 :])
    known = axes.meaning.get(index)
    if len(picked) == 1 and _tells_rows(known, picked[0], axes):
        assert known is not None
        return Transfer((out,), () if _same(known.of, dims[at], axes) else (dims[at],))
    return Transfer((out,), (dims[at],))


def _tells_rows(known: Meaning | None, picked: Dim, axes: AxisMap) -> bool:
    """Whether integers are positions that were found by sorting.

    Those of an ``arange`` over tokens are positions on the canvas, which packed rows are not at.
    """
    if known is None or known.kind != "position":
        return False
    return axes.listed(picked) or axes.listed(known.of)


def _arguments(node: Node) -> tuple[Any, ...]:
    return node.args


def _same(left: Dim, right: Dim, axes: AxisMap) -> bool:
    return axes.resolve(left) == axes.resolve(right)


@transfer(aten.index_put.default)
def _index_put(node: Node, axes: AxisMap) -> Transfer:
    """``x[order] = rows``: rows of a sorted list back in their own order."""
    x, indices, values = _arguments(node)[:3]
    (index, *others), dims = indices, axes.dims[x][0]
    known = None if others or index is None else axes.meaning.get(index)
    whole = known is not None and known.kind == "position" and not argument(node, 3, "accumulate")
    if not whole or not _is_order(axes.dims[index][0][0], axes):
        return Transfer(fresh(node, axes), (*dims, *axes.dims[values][0]))
    assert known is not None
    (axis,) = axes.resolve(axes.dims[index][0][0])
    assert axis.order is not None
    rows, *rest = axes.dims[values][0]
    axes.unify(rows, (axis,))
    if not _same(axis.order, known.of, axes):
        return Transfer(fresh(node, axes), (*dims, rows))
    return Transfer(((known.of, *rest),))


@transfer(aten.index_add.default)
def _index_add(node: Node, axes: AxisMap) -> Transfer:
    """``x.index_add(0, token, rows)``: the rows of a sorted list added up per token."""
    x, index, rows = operands(node)
    dims, (picked,) = axes.dims[x][0], axes.dims[index][0]
    known = axes.meaning.get(index)
    if node.args[1] != 0:
        return Transfer(fresh(node, axes), (*dims, *axes.dims[rows][0]))
    for left, right in zip((picked, *dims[1:]), axes.dims[rows][0], strict=True):
        axes.unify(left, right)
    if not _tells_rows(known, picked, axes):
        return Transfer((dims,), (dims[0], picked))
    assert known is not None
    axes.unify(dims[0], known.of)
    return Transfer((dims,))


@transfer(aten.histc.default, aten.bincount.default)
def _count(node: Node, axes: AxisMap) -> Transfer:
    """How many rows of a sorted list each expert has."""
    source = operands(node)[0]
    known = axes.meaning.get(source)
    listed = known is not None and known.kind == "sorted"
    return Transfer(fresh(node, axes), () if listed else axes.dims[source][0])


@transfer(*GROUPED)
def _grouped_mm(node: Node, axes: AxisMap) -> Transfer:
    rows, weights, ends = operands(node)[:3]
    (list_, inner), weight = axes.dims[rows][0], axes.dims[weights][0]
    known = axes.meaning.get(ends)
    ended = known is not None and known.kind == "end" and _same(known.of, list_, axes)
    mixed = (inner, *weight)
    return Transfer(((list_, weight[-1]),), mixed if ended else (*mixed, list_))


def meaning(node: Node, axes: AxisMap) -> Meaning | None:
    """What the values of a node mean, told from those of its operands."""
    target: Any = node.target
    if len(axes.dims[node][0]) != 1 or target not in _TELLERS:
        return None
    return _TELLERS[target](node, axes)


def _known(node: Node, axes: AxisMap, position: int = 0) -> Meaning | None:
    """What an operand means."""
    source = node.args[position]
    return axes.meaning.get(source) if isinstance(source, Node) else None


def _of_arange(node: Node, axes: AxisMap) -> Meaning | None:
    return Meaning("position", axes.dims[node][0][0]) if node.args[:-1] in ((), (0,)) else None


def _of_sort(node: Node, axes: AxisMap) -> Meaning | None:
    """Of a result of ``sort``: ids, or positions."""
    source, index = node.args
    assert isinstance(source, Node)
    return (
        _listed(axes.dims[node][0][0], bool(index == 1), axes) if source.target in SORTS else None
    )


def _of_argsort(node: Node, axes: AxisMap) -> Meaning | None:
    result = axes.dims[node][0][0]
    if _is_order(result, axes):
        return _listed(result, True, axes)
    source = node.args[0]
    assert isinstance(source, Node)
    return Meaning("position", axes.dims[source][0][0])


def _listed(list_: Dim, positions: bool, axes: AxisMap) -> Meaning:
    (axis,) = axes.resolve(list_)
    assert axis.order is not None
    return Meaning("position", axis.order) if positions else Meaning("sorted", list_)


def _of_count(node: Node, axes: AxisMap) -> Meaning | None:
    known = _known(node, axes)
    return Meaning("count", known.of) if known is not None and known.kind == "sorted" else None


def _of_running_total(node: Node, axes: AxisMap) -> Meaning | None:
    known = _known(node, axes)
    return Meaning("end", known.of) if known is not None and known.kind == "count" else None


def _of_division(node: Node, axes: AxisMap) -> Meaning | None:
    """Positions of (token, choice), divided by the number of choices: positions of tokens."""
    known, by = _known(node, axes), node.args[1]
    floor = node.target is aten.floor_divide.default or node.kwargs["rounding_mode"] == "floor"
    if known is None or known.kind != "position" or not floor:
        return None
    *rest, last = axes.resolve(known.of)
    same = isinstance(by, int) and axes.expr(last.size) == by
    return Meaning("position", tuple(rest)) if same else None


_TELLERS: dict[Any, Callable[[Node, AxisMap], Meaning | None]] = {
    operator.getitem: _of_sort,
    aten.arange.default: _of_arange,
    aten.arange.start: _of_arange,
    aten.index_put.default: lambda node, axes: _known(node, axes, 2),
    aten.cumsum.default: _of_running_total,
    **dict.fromkeys(ARGSORTS, _of_argsort),
    **dict.fromkeys((aten.histc.default, aten.bincount.default), _of_count),
    **dict.fromkeys(CASTS, _known),
    **dict.fromkeys(DIVISIONS, _of_division),
}
