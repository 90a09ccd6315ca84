"""Transfer rules of reductions, of what runs along a dim, and of norms."""

from __future__ import annotations

from torch.fx import Node

from focus_compile.axes.axes import AxisMap, Transfer
from focus_compile.axes.rules.table import one_result, source, transfer
from focus_compile.graph.nodes import argument, aten, operands, tensor_of, wrap


@transfer(
    aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default, aten.any.dim,
    aten.all.dim, aten.argmax.default, aten.var.correction,
)  # fmt: skip
def _reduce(node: Node, axes: AxisMap) -> Transfer:
    dims = axes.dims[source(node)][0]
    over = argument(node, 1, "dim")
    over = [over] if isinstance(over, int) else over
    reduced = {wrap(dim, len(dims)) for dim in over} if over else set(range(len(dims)))
    keep = len(tensor_of(node).shape) == len(dims)
    out = [() if i in reduced else dim for i, dim in enumerate(dims) if keep or i not in reduced]
    return one_result(*out, mixed=[dims[i] for i in reduced])


@transfer(
    aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten.cumsum.default,
)  # fmt: skip
def _along_dim(node: Node, axes: AxisMap) -> Transfer:
    dims = axes.dims[source(node)][0]
    return one_result(*dims, mixed=[dims[wrap(argument(node, 1, "dim"), len(dims))]])


@transfer(aten.topk.default)
def _topk(node: Node, axes: AxisMap) -> Transfer:
    """Values and indices, fewer along one dim."""
    dims = list(axes.dims[source(node)][0])
    dim = wrap(argument(node, 2, "dim", -1), len(dims))
    searched, dims[dim] = dims[dim], axes.fresh(node.meta["val"][0].shape[dim])
    return Transfer((tuple(dims),) * 2, (searched,))


@transfer(aten.rms_norm.default, aten.layer_norm.default)
def _norm(node: Node, axes: AxisMap) -> Transfer:
    dims = axes.dims[source(node)][0]
    normed = len(node.args[1])  # type: ignore[arg-type]
    for operand in operands(node)[1:]:
        for dim, weight_dim in zip(reversed(dims), reversed(axes.dims[operand][0]), strict=False):
            axes.unify(dim, weight_dim)
    return one_result(*dims, mixed=dims[len(dims) - normed :])
