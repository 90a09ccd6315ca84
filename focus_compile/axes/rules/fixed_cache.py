"""Transfer rules of the operators that stand for caches of fixed length."""

from __future__ import annotations

from torch.fx import Node

from focus_compile.axes.axes import AxisMap, Dim, Dims, Transfer
from focus_compile.axes.rules.table import transfer
from focus_compile.graph.nodes import argument, aten, operands, tensor_of, wrap
from focus_compile.ops.library import focus


@transfer(aten.index_copy.default)
def _index_copy(node: Node, axes: AxisMap) -> Transfer:
    """Some slots along one dim are replaced; all other dims of source and slots are the same."""
    x, index, source = (axes.dims[operand][0] for operand in node.args if isinstance(operand, Node))
    at = wrap(argument(node, 1, "dim"), len(x))
    axes.unify(source[at], index[0])
    out = [
        slot_dim if position == at else axes.unify(slot_dim, source_dim)
        for position, (slot_dim, source_dim) in enumerate(zip(x, source, strict=True))
    ]
    return Transfer((tuple(out),), (x[at], source[at]))


@transfer(focus.clear.default)
def _clear(node: Node, axes: AxisMap) -> Transfer:
    x, index = (axes.dims[operand][0] for operand in operands(node))
    return Transfer((_rows(x, index, axes),), (x[node.args[2]], index[-1]))  # type: ignore[index]


@transfer(focus.extend.default)
def _extend(node: Node, axes: AxisMap) -> Transfer:
    x, index = (axes.dims[operand][0] for operand in operands(node))
    at = wrap(argument(node, 2, "dim"), len(x))
    x = _rows(x, index, axes)
    joined = _joined(node, at, (x[at], index[-1]), axes)
    return Transfer(((*x[:at], joined, *x[at + 1 :]),), (x[at], index[-1]))


@transfer(focus.extend_mask.default)
def _extend_mask(node: Node, axes: AxisMap) -> Transfer:
    mask, past, index_node, at = node.args
    slots = axes.dims[past][0][at]  # type: ignore[index]
    index = axes.dims[index_node][0]  # type: ignore[index]
    lead: Dims = ((),) * 3
    if isinstance(mask, Node):
        *lead, last = axes.dims[mask][0]  # type: ignore[assignment]
        axes.unify(last, slots)
    if len(index) > 1:
        lead = _rows((*((),) * (3 - len(lead)), *lead), index, axes)
    joined = _joined(node, len(lead), (slots, index[-1]), axes)
    return Transfer(((*lead, joined),), (slots, index[-1]))


@transfer(focus.replace.default)
def _replace(node: Node, axes: AxisMap) -> Transfer:
    past, joined, index = (axes.dims[operand][0] for operand in operands(node))
    past = _rows(past, index, axes)
    at: int = node.args[3]  # type: ignore[assignment]
    out = [
        past_dim if position == at else axes.unify(past_dim, joined_dim)
        for position, (past_dim, joined_dim) in enumerate(zip(past, joined, strict=True))
    ]
    return Transfer((tuple(out),), (past[at], joined[at]))


def _rows(dims: Dims, index: Dims, axes: AxisMap) -> Dims:
    """Where rows have slots of their own, the first dim is the batch."""
    return dims if len(index) == 1 else (axes.unify(dims[0], index[0]), *dims[1:])


def _joined(node: Node, at: int, terms: tuple[Dim, Dim], axes: AxisMap) -> Dim:
    dim = axes.fresh(tensor_of(node).shape[at])
    dim[0].sum = terms
    return dim
