"""Transfer rules of lookups by index."""

from __future__ import annotations

from torch.fx import Node

from focus_compile.axes.axes import AxisMap, Transfer
from focus_compile.axes.rules.table import EMBEDDINGS, fresh, one_result, source, transfer
from focus_compile.graph.nodes import argument, aten, operands, wrap


@transfer(*EMBEDDINGS)
def _embedding(node: Node, axes: AxisMap) -> Transfer:
    weight, ids = operands(node)[:2]
    rows, features = axes.dims[weight][0]
    return one_result(*axes.dims[ids][0], features, mixed=[rows])


@transfer(aten.gather.default, aten.scatter.value, aten.scatter.src, aten.scatter_add.default)
def _indexed(node: Node, axes: AxisMap) -> Transfer:
    """Elements at positions along one dim; all other dims of source and index are the same."""
    x, index = (axes.dims[operand][0] for operand in operands(node)[:2])
    at = wrap(argument(node, 1, "dim"), len(x))
    for indexed in operands(node)[1:]:
        for position, (dim, indexed_dim) in enumerate(zip(x, axes.dims[indexed][0], strict=True)):
            if position != at:
                axes.unify(dim, indexed_dim)
    if node.target is aten.gather.default:
        return one_result(*index, mixed=[x[at]])
    return one_result(*x, mixed=[x[at], index[at]])


@transfer(aten.index_select.default)
def _index_select(node: Node, axes: AxisMap) -> Transfer:
    x, index = (axes.dims[operand][0] for operand in operands(node))
    at = wrap(argument(node, 1, "dim"), len(x))
    return one_result(*x[:at], index[0], *x[at + 1 :], mixed=[x[at]])


@transfer(aten.repeat_interleave.self_int)
def _repeat_interleave(node: Node, axes: AxisMap) -> Transfer:
    """Each element of a dim ``times`` in a row: the dim becomes a product."""
    dims = list(axes.dims[source(node)][0])
    at = argument(node, 2, "dim")
    if at is None:
        return Transfer(fresh(node, axes), tuple(dims))
    dims[wrap(at, len(dims))] += axes.fresh(argument(node, 1, "repeats"))
    return one_result(*dims)
