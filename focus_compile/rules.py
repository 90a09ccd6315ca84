"""Transfer rules: one table, operator overload -> what it does to axes.

A rule returns a :class:`~focus_compile.axes.Transfer`. Its law, which tests/test_rules.py holds
every entry against: *gathering along an axis that is not mixed commutes with the operator*.
An operator without a rule gives fresh axes; it is refused only where packed tokens reach it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch.fx import Node

from focus_compile.axes import AxisMap, Dim, Dims, Transfer, expr_of, tensor_of
from focus_compile.ops import focus
from focus_compile.torch_private import OpOverload

__all__ = [
    "ARANGES",
    "EMBEDDINGS",
    "POINTWISE",
    "RESHAPES",
    "RULES",
    "argument",
    "operands",
    "transfer",
]

aten = torch.ops.aten
EMBEDDINGS = (aten.embedding.default, focus.embedding_shard.default)
RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
Rule = Callable[[Node, AxisMap], Transfer]
RULES: dict[OpOverload, Rule] = {}


def transfer(*ops: OpOverload) -> Callable[[Rule], Rule]:
    """Register a rule for ``ops``."""

    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(ops, rule))
        return rule

    return register


def operands(node: Node) -> list[Node]:
    """Tensor operands of a node, in order of appearance."""
    return [arg for arg in node.all_input_nodes if isinstance(arg.meta.get("val"), torch.Tensor)]


def argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    """An argument given by position or by keyword."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def wrap(dim: int, rank: int) -> int:
    return dim % rank if rank else 0


def _sizes(node: Node) -> list[sympy.Expr]:
    return [expr_of(size) for size in tensor_of(node).shape]


def _one(*dims: Dim, mixed: Sequence[Dim] = ()) -> Transfer:
    return Transfer((tuple(dims),), tuple(mixed))


def _source(node: Node) -> Node:
    source = node.args[0]
    assert isinstance(source, Node)
    return source


def fresh(node: Node, axes: AxisMap) -> tuple[Dims, ...]:
    value = node.meta["val"]
    results = value if isinstance(value, list | tuple) else [value]
    return tuple(
        tuple(axes.fresh(size) for size in result.shape) if isinstance(result, torch.Tensor) else ()
        for result in results
    )


POINTWISE = (
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
    aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.to.other, aten._to_copy.default,
    aten.type_as.default, aten.clone.default, aten.contiguous.default, aten.alias.default,
    aten.detach.default, aten.detach_.default, aten.lift_fresh_copy.default,
    aten.dropout.default, aten.addcmul.default, aten.lerp.Tensor,
    aten.ones_like.default, aten.zeros_like.default, aten.full_like.default, aten.copy.default,
    torch.ops._c10d_functional.all_reduce.default, torch.ops._c10d_functional.wait_tensor.default,
)  # fmt: skip


@transfer(*POINTWISE)
def _pointwise(node: Node, axes: AxisMap) -> Transfer:
    out: list[Dim] = []
    inputs = [axes.dims[operand][0] for operand in operands(node)]
    for index, size in enumerate(reversed(tensor_of(node).shape), start=1):
        aligned: Dim = ()
        for dims in inputs:
            if index <= len(dims):
                aligned = axes.unify(aligned, dims[-index])
        out.insert(0, aligned if aligned or axes.expr(size) == 1 else axes.fresh(size))
    return _one(*out)


@transfer(
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints,
    aten.unflatten.int, aten.squeeze.dim, aten.unsqueeze.default, aten.squeeze.default,
)  # fmt: skip
def _view(node: Node, axes: AxisMap) -> Transfer:
    if 0 in _sizes(node):
        return Transfer(fresh(node, axes), axes.dims[_source(node)][0])
    factors = tuple(axis for dim in axes.dims[_source(node)][0] for axis in dim)
    return _one(*axes.regroup(factors, _sizes(node)))


@transfer(aten.expand.default)
def _expand(node: Node, axes: AxisMap) -> Transfer:
    dims = axes.dims[_source(node)][0]
    shape = tensor_of(node).shape
    dims = ((),) * (len(shape) - len(dims)) + dims
    return _one(*(dim or axes.fresh(size) for dim, size in zip(dims, shape, strict=True)))


@transfer(aten.transpose.int)
def _transpose(node: Node, axes: AxisMap) -> Transfer:
    dims = list(axes.dims[_source(node)][0])
    i, j = (wrap(dim, len(dims)) for dim in node.args[1:])  # type: ignore[arg-type]
    dims[i], dims[j] = dims[j], dims[i]
    return _one(*dims)


@transfer(aten.t.default)
def _t(node: Node, axes: AxisMap) -> Transfer:
    return _one(*reversed(axes.dims[_source(node)][0]))


@transfer(aten.permute.default)
def _permute(node: Node, axes: AxisMap) -> Transfer:
    dims = axes.dims[_source(node)][0]
    return _one(*(dims[wrap(dim, len(dims))] for dim in node.args[1]))  # type: ignore


@transfer(aten.slice.Tensor)
def _slice(node: Node, axes: AxisMap) -> Transfer:
    dims = list(axes.dims[_source(node)][0])
    at = wrap(argument(node, 1, "dim", 0), len(dims))
    if axes.expr(_sizes(node)[at]) == axes.expr(_sizes(_source(node))[at]):
        return _one(*dims)
    old, dims[at] = dims[at], axes.fresh(tensor_of(node).shape[at])
    return _one(*dims, mixed=[old])


@transfer(aten.select.int)
def _select(node: Node, axes: AxisMap) -> Transfer:
    dims = list(axes.dims[_source(node)][0])
    old = dims.pop(wrap(argument(node, 1, "dim", 0), len(dims)))
    return _one(*dims, mixed=[old])


@transfer(
    aten.split.Tensor, aten.split_with_sizes.default, aten.split.sizes, aten.chunk.default,
)  # fmt: skip
def _split(node: Node, axes: AxisMap) -> Transfer:
    dims = axes.dims[_source(node)][0]
    at = wrap(argument(node, 2, "dim", 0), len(dims))
    out = [(*dims[:at], axes.fresh(part.shape[at]), *dims[at + 1 :]) for part in node.meta["val"]]
    return Transfer(tuple(out), (dims[at],))


@transfer(aten.unbind.int)
def _unbind(node: Node, axes: AxisMap) -> Transfer:
    dims = axes.dims[_source(node)][0]
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
    return _one(*out, mixed=[axes.dims[part][0][at] for part in parts])


def cat_parts(node: Node) -> list[Node]:
    """Operands of a ``cat`` without the empty 1-D tensors that it skips."""
    parts: list[Node] = list(node.args[0])  # type: ignore[arg-type]
    rank = tensor_of(node).dim()
    return [part for part in parts if tensor_of(part).dim() == rank]


ARANGES = (aten.arange.default, aten.arange.start, aten.arange.start_step)


@transfer(*ARANGES)
def _arange(node: Node, axes: AxisMap) -> Transfer:
    """An axis of its own, until an elementwise operator tells which one it is."""
    return _one(*(axes.fresh(size) for size in tensor_of(node).shape))


@transfer(aten.type_as.default, aten.to.other)
def _cast(node: Node, axes: AxisMap) -> Transfer:
    """To the dtype of another value, whose shape does not matter."""
    return _one(*axes.dims[_source(node)][0])


@transfer(aten.empty_like.default)
def _empty_like(node: Node, axes: AxisMap) -> Transfer:
    """No values to speak of: whoever reads them before they are written gets anything."""
    return _one(*axes.dims[_source(node)][0])


@transfer(*EMBEDDINGS)
def _embedding(node: Node, axes: AxisMap) -> Transfer:
    weight, ids = operands(node)[:2]
    rows, features = axes.dims[weight][0]
    return _one(*axes.dims[ids][0], features, mixed=[rows])


@transfer(focus.gather_ranks.default)
def _gather_ranks(node: Node, axes: AxisMap) -> Transfer:
    *rows, features = axes.dims[_source(node)][0]
    return _one(*rows, axes.fresh(tensor_of(node).shape[-1]), mixed=[features])


@transfer(aten.linear.default)
def _linear(node: Node, axes: AxisMap) -> Transfer:
    x, weight = operands(node)[:2]
    *rows, features = axes.dims[x][0]
    out, inner = axes.dims[weight][0]
    axes.unify(features, inner)
    bias = argument(node, 2, "bias")
    if isinstance(bias, Node):
        axes.unify(out, axes.dims[bias][0][0])
    return _one(*rows, out, mixed=[features, inner])


@transfer(aten.matmul.default, aten.bmm.default, aten.mm.default)
def _matmul(node: Node, axes: AxisMap) -> Transfer:
    left, right = (axes.dims[operand][0] for operand in node.args)  # type: ignore[index]
    if len(left) < 2 or len(right) < 2:
        return Transfer(fresh(node, axes), (*left, *right))
    axes.unify(left[-1], right[-2])
    batch: list[Dim] = []
    for index in range(3, max(len(left), len(right)) + 1):
        dims = [side[-index] for side in (left, right) if index <= len(side)]
        batch.insert(0, axes.unify(dims[0], dims[-1]))
    return _one(*batch, left[-2], right[-1], mixed=[left[-1], right[-2]])


@transfer(
    aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default, aten.any.dim,
    aten.all.dim, aten.argmax.default, aten.var.correction,
)  # fmt: skip
def _reduce(node: Node, axes: AxisMap) -> Transfer:
    dims = axes.dims[_source(node)][0]
    over = argument(node, 1, "dim")
    over = [over] if isinstance(over, int) else over
    at = {wrap(dim, len(dims)) for dim in over} if over else set(range(len(dims)))
    keep = len(tensor_of(node).shape) == len(dims)
    out = [() if i in at else dim for i, dim in enumerate(dims) if keep or i not in at]
    return _one(*out, mixed=[dims[i] for i in at])


@transfer(
    aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten.cumsum.default,
)  # fmt: skip
def _along(node: Node, axes: AxisMap) -> Transfer:
    dims = axes.dims[_source(node)][0]
    return _one(*dims, mixed=[dims[wrap(argument(node, 1, "dim"), len(dims))]])


@transfer(aten.topk.default)
def _topk(node: Node, axes: AxisMap) -> Transfer:
    """Values and indices, fewer along one dim."""
    dims = list(axes.dims[_source(node)][0])
    at = wrap(argument(node, 2, "dim", -1), len(dims))
    old, dims[at] = dims[at], axes.fresh(node.meta["val"][0].shape[at])
    return Transfer((tuple(dims),) * 2, (old,))


@transfer(aten.gather.default, aten.scatter.value, aten.scatter.src, aten.scatter_add.default)
def _indexed(node: Node, axes: AxisMap) -> Transfer:
    """Elements at positions along one dim; all other dims of source and index are the same."""
    x, index = (axes.dims[operand][0] for operand in operands(node)[:2])
    at = wrap(argument(node, 1, "dim"), len(x))
    for other in operands(node)[1:]:
        for place, (left, right) in enumerate(zip(x, axes.dims[other][0], strict=True)):
            if place != at:
                axes.unify(left, right)
    if node.target is aten.gather.default:
        return _one(*index, mixed=[x[at]])
    return _one(*x, mixed=[x[at], index[at]])


@transfer(aten.index_select.default)
def _index_select(node: Node, axes: AxisMap) -> Transfer:
    x, index = (axes.dims[operand][0] for operand in operands(node))
    at = wrap(argument(node, 1, "dim"), len(x))
    return _one(*x[:at], index[0], *x[at + 1 :], mixed=[x[at]])


@transfer(aten.one_hot.default)
def _one_hot(node: Node, axes: AxisMap) -> Transfer:
    return _one(*axes.dims[_source(node)][0], axes.fresh(tensor_of(node).shape[-1]))


@transfer(aten.repeat_interleave.self_int)
def _repeat_interleave(node: Node, axes: AxisMap) -> Transfer:
    """Each element of a dim ``times`` in a row: the dim becomes a product."""
    dims = list(axes.dims[_source(node)][0])
    at = argument(node, 2, "dim")
    if at is None:
        return Transfer(fresh(node, axes), tuple(dims))
    dims[wrap(at, len(dims))] += axes.fresh(argument(node, 1, "repeats"))
    return _one(*dims)


@transfer(aten.rms_norm.default, aten.layer_norm.default)
def _norm(node: Node, axes: AxisMap) -> Transfer:
    dims = axes.dims[_source(node)][0]
    over = len(node.args[1])  # type: ignore[arg-type]
    for operand in operands(node)[1:]:
        for left, right in zip(reversed(dims), reversed(axes.dims[operand][0]), strict=False):
            axes.unify(left, right)
    return _one(*dims, mixed=dims[len(dims) - over :])


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
    return _one(*query[:-1], value[-1], mixed=[key[-2], query[-1], key[-1], *heads])
