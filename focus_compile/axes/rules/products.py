"""Transfer rules of matrix products and attention."""

from __future__ import annotations

from torch.fx import Node

from focus_compile.axes.axes import AxisMap, Dim, Transfer
from focus_compile.axes.rules.table import fresh, one_result, source, transfer
from focus_compile.graph.nodes import argument, aten, operands, tensor_of
from focus_compile.ops.library import focus


@transfer(focus.gather_ranks.default)
def _gather_ranks(node: Node, axes: AxisMap) -> Transfer:
    *rows, features = axes.dims[source(node)][0]
    return one_result(*rows, axes.fresh(tensor_of(node).shape[-1]), mixed=[features])


@transfer(aten.linear.default)
def _linear(node: Node, axes: AxisMap) -> Transfer:
    x, weight = operands(node)[:2]
    *rows, last = axes.dims[x][0]
    out_features, in_features = axes.dims[weight][0]
    axes.unify(last, in_features)
    bias = argument(node, 2, "bias")
    if isinstance(bias, Node):
        axes.unify(out_features, axes.dims[bias][0][0])
    return one_result(*rows, out_features, mixed=[last, in_features])


@transfer(aten.matmul.default, aten.bmm.default, aten.mm.default)
def _matmul(node: Node, axes: AxisMap) -> Transfer:
    left, right = (axes.dims[operand][0] for operand in node.args)  # type: ignore[index]
    if len(left) < 2 or len(right) < 2:
        return Transfer(fresh(node, axes), (*left, *right))
    axes.unify(left[-1], right[-2])
    batch: list[Dim] = []
    for index in range(3, max(len(left), len(right)) + 1):
        dims = [
            operand_dims[-index] for operand_dims in (left, right) if index <= len(operand_dims)
        ]
        batch.insert(0, axes.unify(dims[0], dims[-1]))
    return one_result(*batch, left[-2], right[-1], mixed=[left[-1], right[-2]])


@transfer(aten.scaled_dot_product_attention.default)
def _attention(node: Node, axes: AxisMap) -> Transfer:
    query, key, value = (axes.dims[operand][0] for operand in node.args[:3])  # type: ignore
    axes.unify(key[-2], value[-2])
    axes.unify(query[-1], key[-1])
    grouped = argument(node, 7, "enable_gqa", False)
    for index in range(3, len(query) + 1):
        axes.unify(key[-index], value[-index])
        if not (grouped and index == 3):
            axes.unify(query[-index], key[-index])
    mask = argument(node, 3, "attn_mask")
    if isinstance(mask, Node):
        dims = axes.dims[mask][0]
        axes.unify(dims[-1], key[-2])
        axes.unify(dims[-2], query[-2])
        for index in range(3, len(dims) + 1):
            axes.unify(dims[-index], query[-index])
    heads = [query[-3], key[-3]] if grouped else []  # neighbouring query heads share a key head
    return one_result(*query[:-1], value[-1], mixed=[key[-2], query[-1], key[-1], *heads])
