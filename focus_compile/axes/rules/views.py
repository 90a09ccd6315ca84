"""Transfer rules of views, and of what cuts a tensor up or joins tensors."""

from __future__ import annotations

from typing import Any

import sympy
from torch.fx import Node

from focus_compile.axes.axes import AxisMap, Dim, Transfer
from focus_compile.axes.rules.table import fresh, one_result, source, transfer
from focus_compile.graph.nodes import (
    argument,
    aten,
    cat_parts,
    expr_of,
    operands,
    tensor_of,
    wrap,
)


def _sizes(node: Node) -> list[sympy.Expr]:
    return [expr_of(size) for size in tensor_of(node).shape]


@transfer(
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints,
    aten.unflatten.int, aten.squeeze.dim, aten.unsqueeze.default, aten.squeeze.default,
)  # fmt: skip
def _view(node: Node, axes: AxisMap) -> Transfer:
    if 0 in _sizes(node):
        return Transfer(fresh(node, axes), axes.dims[source(node)][0])
    factors = tuple(axis for dim in axes.dims[source(node)][0] for axis in dim)
    return one_result(*axes.regroup(factors, _sizes(node)))


@transfer(aten.view_as.default, aten.reshape_as.default)
def _view_as(node: Node, axes: AxisMap) -> Transfer:
    """The axes of another value, of which nothing else is read."""
    (dims,), other = _view(node, axes).out, axes.dims[operands(node)[-1]][0]
    return one_result(*(axes.unify(dim, as_) for dim, as_ in zip(dims, other, strict=True)))


@transfer(aten.expand.default)
def _expand(node: Node, axes: AxisMap) -> Transfer:
    dims = axes.dims[source(node)][0]
    shape = tensor_of(node).shape
    dims = ((),) * (len(shape) - len(dims)) + dims
    return one_result(*(dim or axes.fresh(size) for dim, size in zip(dims, shape, strict=True)))


@transfer(aten.expand_as.default)
def _expand_as(node: Node, axes: AxisMap) -> Transfer:
    """The axes of another value where there are none, and nothing else of it."""
    dims, others = (axes.dims[operand][0] for operand in operands(node))
    dims = ((),) * (len(others) - len(dims)) + dims
    return one_result(*(axes.unify(dim, other) for dim, other in zip(dims, others, strict=True)))


@transfer(aten.repeat.default)
def _repeat(node: Node, axes: AxisMap) -> Transfer:
    """Each dim ``times`` in a row, as a whole: the dim becomes a product."""
    dims = axes.dims[source(node)][0]
    given: Any = node.args[1]
    times = [n.meta["val"] if isinstance(n, Node) else n for n in given]
    dims = ((),) * (len(times) - len(dims)) + dims
    return one_result(*(axes.fresh(n) + dim for n, dim in zip(times, dims, strict=True)))


@transfer(aten.transpose.int)
def _transpose(node: Node, axes: AxisMap) -> Transfer:
    dims = list(axes.dims[source(node)][0])
    i, j = (wrap(dim, len(dims)) for dim in node.args[1:])  # type: ignore[arg-type]
    dims[i], dims[j] = dims[j], dims[i]
    return one_result(*dims)


@transfer(aten.t.default)
def _t(node: Node, axes: AxisMap) -> Transfer:
    return one_result(*reversed(axes.dims[source(node)][0]))


@transfer(aten.permute.default)
def _permute(node: Node, axes: AxisMap) -> Transfer:
    dims = axes.dims[source(node)][0]
    return one_result(*(dims[wrap(dim, len(dims))] for dim in node.args[1]))  # type: ignore


@transfer(aten.slice.Tensor)
def _slice(node: Node, axes: AxisMap) -> Transfer:
    dims = list(axes.dims[source(node)][0])
    at = wrap(argument(node, 1, "dim", 0), len(dims))
    if axes.expr(_sizes(node)[at]) == axes.expr(_sizes(source(node))[at]):
        return one_result(*dims)
    sliced, dims[at] = dims[at], axes.fresh(tensor_of(node).shape[at])
    return one_result(*dims, mixed=[sliced])


@transfer(aten.select.int)
def _select(node: Node, axes: AxisMap) -> Transfer:
    dims = list(axes.dims[source(node)][0])
    selected = dims.pop(wrap(argument(node, 1, "dim", 0), len(dims)))
    return one_result(*dims, mixed=[selected])


@transfer(
    aten.split.Tensor, aten.split_with_sizes.default, aten.split.sizes, aten.chunk.default,
)  # fmt: skip
def _split(node: Node, axes: AxisMap) -> Transfer:
    dims = axes.dims[source(node)][0]
    at = wrap(argument(node, 2, "dim", 0), len(dims))
    out = [(*dims[:at], axes.fresh(piece.shape[at]), *dims[at + 1 :]) for piece in node.meta["val"]]
    return Transfer(tuple(out), (dims[at],))


@transfer(aten.unbind.int)
def _unbind(node: Node, axes: AxisMap) -> Transfer:
    dims = axes.dims[source(node)][0]
    at = wrap(argument(node, 1, "dim", 0), len(dims))
    return Transfer(((*dims[:at], *dims[at + 1 :]),) * len(node.meta["val"]), (dims[at],))


@transfer(aten.cat.default)
def _cat(node: Node, axes: AxisMap) -> Transfer:
    parts = cat_parts(node)
    if len(parts) == 1:
        return Transfer(axes.dims[parts[0]])
    rank = len(axes.dims[parts[0]][0])
    at = wrap(argument(node, 1, "dim", 0), rank)
    out: list[Dim] = []
    for index in range(rank):
        column = [axes.dims[part][0][index] for part in parts]
        if index == at:
            joined = axes.fresh(tensor_of(node).shape[at])
            joined[0].sum = tuple(column)
            out.append(joined)
            continue
        merged: Dim = ()
        for dim in column:
            merged = axes.unify(merged, dim)
        out.append(merged)
    return one_result(*out, mixed=[axes.dims[part][0][at] for part in parts])
