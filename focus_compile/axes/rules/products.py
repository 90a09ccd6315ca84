"""Transfer rules of matrix products and attention."""

from __future__ import annotations

from torch.fx import Node

from focus_compile.axes.axes import AxisMap, Dim, Transfer
from focus_compile.axes.rules.table import fresh, named, one_result, rule_of, source, transfer
from focus_compile.graph.nodes import argument, aten, operands, tensor_of
from focus_compile.ops.library import focus

__all__ = ["is_packed_product"]

_PACKED = (
    aten._weight_int8pack_mm.default, aten._weight_int4pack_mm.default,
    aten._weight_int4pack_mm_for_cpu.default, aten._dyn_quant_matmul_4bit.default,
    aten._weight_int4pack_mm_with_scales_and_zeros.default,
)  # fmt: skip
_NAMED = (
    "bitsandbytes::gemv_4bit", "bitsandbytes::gemm_4bit", "mslk::bf16i4bf16_rowwise",
)  # fmt: skip
"""``(rows, packed weight, ...)``: PyTorch's, and those of bitsandbytes and torchao's kernels."""


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


@transfer(aten.addmm.default)
def _addmm(node: Node, axes: AxisMap) -> Transfer:
    added, left, right = (axes.dims[operand][0] for operand in operands(node))
    axes.unify(left[1], right[0])
    out = (left[0], right[1])
    for dim, added_dim in zip(reversed(out), reversed(added), strict=False):
        axes.unify(dim, added_dim)
    return one_result(*out, mixed=[left[1], right[0]])


def is_packed_product(node: Node) -> bool:
    """Whether a node multiplies rows by a weight whose layout only its operator knows."""
    return rule_of(node) is _packed_product


@named(*_NAMED)
@transfer(*_PACKED)
def _packed_product(node: Node, axes: AxisMap) -> Transfer:
    """Rows times a weight whose layout only the operator knows, and its scales."""
    x, *weight = (axes.dims[operand][0] for operand in operands(node))
    mixed = [x[-1], *(dim for dims in weight for dim in dims)]
    return one_result(*x[:-1], axes.fresh(tensor_of(node).shape[-1]), mixed=mixed)


@transfer(aten._scaled_mm.default)
def _scaled_mm(node: Node, axes: AxisMap) -> Transfer:
    """Scales: one for all, or one per row of the left factor and per column of the right one."""
    left, right, left_scale, right_scale, *rest = (
        axes.dims[operand][0] for operand in operands(node)
    )
    axes.unify(left[1], right[0])
    mixed = [left[1], right[0]]
    if len(left_scale) == 2:
        axes.unify(left[0], left_scale[0])
        axes.unify(right[1], right_scale[-1])
        mixed += [left_scale[1], *right_scale[:-1]]
    else:
        mixed += [*left_scale, *right_scale]
    if isinstance(argument(node, 4, "bias"), Node):
        axes.unify(right[1], rest[0][0])
    return one_result(left[0], right[1], mixed=mixed)


@transfer(aten.matmul.default, aten.bmm.default, aten.mm.default, aten._int_mm.default)
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
