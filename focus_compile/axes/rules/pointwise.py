"""Transfer rules of operators that compute every element by itself."""

from __future__ import annotations

import torch
from torch.fx import Node

from focus_compile.axes.axes import AxisMap, Dim, Transfer
from focus_compile.axes.rules.table import one_result, source, transfer
from focus_compile.graph.nodes import aten, operands, tensor_of

__all__ = ["NUMERIC", "POINTWISE"]

_ELEMENTWISE = (
    aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar, aten.rsub.Scalar,
    aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar, aten.neg.default,
    aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor, aten.rsqrt.default, aten.sqrt.default,
    aten.square.default, aten.reciprocal.default, aten.abs.default, aten.exp.default,
    aten.log.default, aten.log1p.default, aten.sin.default, aten.cos.default, aten.tanh.default,
    aten.sigmoid.default, aten.silu.default, aten.gelu.default, aten.relu.default,
    aten.leaky_relu.default, aten.hardtanh.default, aten.softplus.default, aten.erf.default,
    aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default, aten.maximum.default,
    aten.minimum.default, aten.floor.default, aten.ceil.default, aten.round.default,
    aten.remainder.Scalar, aten.fmod.Scalar, aten.floor_divide.default,
    aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar,
    aten.masked_fill.Scalar, aten.masked_fill.Tensor,
    aten.eq.Tensor, aten.eq.Scalar, aten.ne.Tensor, aten.ne.Scalar, aten.lt.Tensor, aten.lt.Scalar,
    aten.le.Tensor, aten.le.Scalar, aten.gt.Tensor, aten.gt.Scalar, aten.ge.Tensor, aten.ge.Scalar,
    aten.logical_and.default, aten.logical_or.default, aten.logical_not.default,
    aten.bitwise_and.Tensor, aten.bitwise_or.Tensor, aten.bitwise_not.default,
    aten.__and__.Tensor, aten.__or__.Tensor, aten.isnan.default, aten.isinf.default,
    aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten._to_copy.default,
    aten.clone.default, aten.contiguous.default, aten.alias.default,
    aten.detach.default, aten.detach_.default, aten.lift_fresh_copy.default,
    aten.dropout.default, aten.addcmul.default, aten.lerp.Tensor,
    aten.copy.default,
    torch.ops._c10d_functional.all_reduce.default, torch.ops._c10d_functional.wait_tensor.default,
)  # fmt: skip
_CASTS = (aten.type_as.default, aten.to.other)
POINTWISE = (*_ELEMENTWISE, *_CASTS)

NUMERIC = {
    overload: packet.Tensor
    for packet in (
        aten.add, aten.sub, aten.mul, aten.div,
        aten.eq, aten.ne, aten.lt, aten.le, aten.gt, aten.ge,
    )
    for overload in (packet.Tensor, packet.Scalar)
}  # fmt: skip
"""Operators whose second operand may be a number, and those that take it as a tensor."""


@transfer(*_ELEMENTWISE)
def _pointwise(node: Node, axes: AxisMap) -> Transfer:
    aligned_dims: list[Dim] = []
    inputs = [axes.dims[operand][0] for operand in operands(node)]
    for index, size in enumerate(reversed(tensor_of(node).shape), start=1):
        aligned: Dim = ()
        for dims in inputs:
            if index <= len(dims):
                aligned = axes.unify(aligned, dims[-index])
        aligned_dims.insert(0, aligned if aligned or axes.expr(size) == 1 else axes.fresh(size))
    return one_result(*aligned_dims)


@transfer(*_CASTS)
def _cast(node: Node, axes: AxisMap) -> Transfer:
    """To the dtype of another value, whose shape does not matter."""
    return one_result(*axes.dims[source(node)][0])


@transfer(aten.one_hot.default)
def _one_hot(node: Node, axes: AxisMap) -> Transfer:
    return one_result(*axes.dims[source(node)][0], axes.fresh(tensor_of(node).shape[-1]))
