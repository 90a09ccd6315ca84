"""One call, or several, of every operator that has a transfer rule; sizes pairwise distinct."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from focus_compile.axes.rules.pointwise import POINTWISE
from focus_compile.ops.library import focus

aten, collectives = torch.ops.aten, torch.ops._c10d_functional
GROUP = "0"
"""The first process group of a process, which here is of one."""
BATCH, TOKENS, SIZE = 3, 5, 7


@dataclass(frozen=True)
class Example:
    """A call, and the least number of axes that its rule must keep."""

    op: OpOverload
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    kept: int = 1

    @property
    def name(self) -> str:
        shapes = [list(arg.shape) for arg in self.args if isinstance(arg, Tensor)]
        return f"{self.op}-{shapes}".replace(" ", "")


def _x(*shape: int) -> Tensor:
    """Positive, so that roots and logarithms are numbers."""
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5


def _flags(*shape: int) -> Tensor:
    return _x(*shape) < 1.0


def _index(*shape: int) -> Tensor:
    """Numbers below 7."""
    return torch.randint(0, 7, shape, generator=torch.Generator().manual_seed(sum(shape)))


X, Y = _x(BATCH, TOKENS, SIZE), _x(TOKENS, 1)
ON, ROW = _flags(BATCH, TOKENS, SIZE), _flags(TOKENS, 1)
SPECIAL: dict[OpOverload, tuple[Any, ...]] = {
    aten.where.self: (ROW, X, _x(BATCH, 1, SIZE)),
    aten.where.ScalarOther: (ON, Y, 0.0),
    aten.where.ScalarSelf: (ON, 0.0, Y),
    aten.where.Scalar: (ON, 1.0, 0.0),
    aten.masked_fill.Scalar: (X, ROW, 0.5),
    aten.masked_fill.Tensor: (X, ROW, torch.tensor(0.5, dtype=torch.float64)),
    aten.to.dtype: (X, torch.float32),
    aten.to.device: (X, torch.device("cpu"), torch.float32),
    aten.to.other: (X, _x(2, 11).float()),
    aten.type_as.default: (X, _flags(2, 11)),
    aten.dropout.default: (X, 0.3, False),
    aten.addcmul.default: (X, Y, X),
    aten.lerp.Tensor: (X, Y, X),
    aten.clamp.default: (X, 0.7, 1.2),
    aten.clamp_min.default: (X, 0.8),
    aten.clamp_max.default: (X, 0.8),
    collectives.all_reduce.default: (X, "sum", GROUP),
}
FLAGS = {
    aten.logical_and.default, aten.logical_or.default, aten.logical_not.default,
    aten.bitwise_and.Tensor, aten.bitwise_or.Tensor, aten.bitwise_not.default,
    aten.__and__.Tensor, aten.__or__.Tensor,
}  # fmt: skip
"""Operators on flags."""


def _pointwise(op: OpOverload) -> Example:
    """A full operand first, one that broadcasts along batch and features second."""
    if op in SPECIAL:
        return Example(op, SPECIAL[op], kept=3)
    tensors, numbers = 0, list[float]()
    for argument in op._schema.arguments:
        if argument.has_default_value() or argument.kwarg_only:
            continue
        if str(argument.type) == "Tensor":
            tensors += 1
        else:
            numbers.append(2)
    first, second = (ON, ROW) if op in FLAGS else (X, Y)
    return Example(op, ((first, second)[:tensors] + tuple(numbers)), kept=3)


POINTWISE_EXAMPLES = [_pointwise(op) for op in POINTWISE]

SHAPES = [
    Example(aten.view.default, (_x(3, 5, 14), [3, 5, 2, 7]), kept=4),
    Example(aten.view.default, (_x(3, 5, 2, 7), [15, 14]), kept=4),
    Example(aten.view.default, (_x(15, 14), [3, 5, 14]), kept=3),
    Example(aten.reshape.default, (_x(3, 5, 14), [15, 2, 7]), kept=4),
    Example(aten._unsafe_view.default, (_x(3, 5, 14), [3, 5, 7, 2]), kept=4),
    Example(aten.flatten.using_ints, (_x(3, 5, 7), 0, 1), kept=3),
    Example(aten.unflatten.int, (_x(3, 5, 14), 2, [2, 7]), kept=2),
    Example(aten.squeeze.dim, (_x(3, 1, 5), 1), kept=2),
    Example(aten.squeeze.default, (_x(3, 1, 5),), kept=2),
    Example(aten.unsqueeze.default, (_x(3, 5), 1), kept=2),
    Example(aten.expand.default, (_x(3, 1, 7), [3, 5, 7]), kept=2),
    Example(aten.expand.default, (_x(5, 7), [3, -1, 7]), kept=2),
    Example(aten.expand_as.default, (_x(5, 1), X), kept=3),
    Example(aten.view_as.default, (_x(15, 7), X), kept=3),
    Example(aten.reshape_as.default, (_x(15, 7), X), kept=3),
    Example(aten.repeat.default, (X, [2, 1, 1, 3]), kept=3),
    Example(aten.transpose.int, (X, 1, -1), kept=3),
    Example(aten.t.default, (_x(5, 7),), kept=2),
    Example(aten.permute.default, (X, [2, 0, -2]), kept=3),
    Example(aten.slice.Tensor, (X, 2, 1, 4), kept=2),
    Example(aten.slice.Tensor, (X, 1), kept=3),
    Example(aten.select.int, (X, 1, 2), kept=2),
    Example(aten.unbind.int, (X, -1), kept=2),
    Example(aten.split.Tensor, (X, 3, 2), kept=2),
    Example(aten.split_with_sizes.default, (X, [3, 4], 2), kept=2),
    Example(aten.split.sizes, (X, [3, 4], 2), kept=2),
    Example(aten.chunk.default, (X, 2, -1), kept=2),
    Example(aten.cat.default, ([_x(3, 2, 4, 7), _x(3, 2, 5, 7)], 2), kept=3),
    Example(aten.cat.default, ([_x(3, 5, 7)], 1), kept=3),
    Example(aten.cat.default, ([torch.empty(0, dtype=torch.float64), X], -2), kept=3),
]
QKV = (_x(3, 4, 5, 8), _x(3, 4, 7, 8), _x(3, 4, 7, 11))
GROUPED = (_x(3, 6, 5, 8), _x(3, 2, 7, 8), _x(3, 2, 7, 11))
GROUPS = (_x(5, 16).float(), _x(3, 16, 8).float())
ENDS = torch.tensor([2, 2, 5], dtype=torch.int32)
SLOTS = torch.tensor([1, 0, 4, 2])
ROW_SLOTS = torch.stack([SLOTS, SLOTS.flip(0), SLOTS.roll(1)])
CODES = torch.randint(-9, 9, (17, 64), generator=torch.Generator().manual_seed(1)).to(torch.int8)
CODES_T = CODES[:16].t().contiguous()
_NIBBLES = torch.randint(0, 15, (32, 64), generator=torch.Generator().manual_seed(2)).int()
INT4 = (aten._convert_weight_to_int4pack_for_cpu(_NIBBLES, 1), 32, _x(2, 32, 2).float())
ARM = (
    aten._dyn_quant_pack_4bit_weight(_NIBBLES[:, :32].to(torch.uint8), _x(32, 1).float(), None, 64,
                                     64, 32),
    64, 64, 32,
)  # fmt: skip
EIGHTS = (_x(17, 32).to(torch.float8_e4m3fn), _x(16, 32).to(torch.float8_e4m3fn).t())
BF16 = {"out_dtype": torch.bfloat16}
ON_CUDA = {
    aten._weight_int4pack_mm.default,
    aten._weight_int4pack_mm_with_scales_and_zeros.default,
}
"""Operators that run on CUDA alone."""
MIXERS = [
    Example(aten.embedding.default, (_x(61, 13), torch.tensor([[4, 0, 9, 60, 2]] * 3)), kept=3),
    Example(focus.embedding_shard.default, (_x(61, 13), torch.tensor([[9, 4, 2]] * 5), 3), kept=3),
    Example(focus.gather_ranks.default, (X, SIZE, 1, GROUP), kept=2),
    Example(aten.linear.default, (X, _x(11, 7), _x(11)), kept=3),
    Example(aten.linear.default, (X, _x(11, 7)), kept=3),
    Example(aten.matmul.default, (_x(3, 2, 5, 7), _x(3, 2, 7, 11)), kept=4),
    Example(aten.matmul.default, (_x(3, 2, 5, 7), _x(7, 11)), kept=4),
    Example(aten.bmm.default, (_x(3, 5, 7), _x(3, 7, 11)), kept=3),
    Example(aten.mm.default, (_x(5, 7), _x(7, 11)), kept=2),
    Example(aten.addmm.default, (_x(11), _x(5, 7), _x(7, 11)), kept=2),
    Example(aten.addmm.default, (_x(5, 1), _x(5, 7), _x(7, 11)), kept=2),
    Example(aten._int_mm.default, (CODES, CODES_T), kept=2),
    Example(aten._weight_int8pack_mm.default, (_x(5, 64).float(), CODES[:16], _x(16).float())),
    Example(aten._weight_int4pack_mm_for_cpu.default, (_x(5, 64).float(), *INT4)),
    Example(aten._dyn_quant_matmul_4bit.default, (_x(5, 64).float(), *ARM)),
    Example(aten._scaled_mm.default, (*EIGHTS, _x(17, 1).float(), _x(1, 16).float()), BF16, kept=2),
    Example(aten._scaled_mm.default, (*EIGHTS, _x(1).float(), _x(1).float()), BF16, kept=2),
    Example(aten.mean.dim, (X, [-1], True), kept=2),
    Example(aten.sum.dim_IntList, (X, [1, 2]), kept=1),
    Example(aten.amax.default, (X, [1]), kept=2),
    Example(aten.amin.default, (X, [-1], True), kept=2),
    Example(aten.any.dim, (ON, -1), kept=2),
    Example(aten.all.dim, (ON, 1, True), kept=2),
    Example(aten.argmax.default, (X, -1), kept=2),
    Example(aten.var.correction, (X, [-1]), kept=2),
    Example(aten.softmax.int, (X, -1), kept=2),
    Example(aten._softmax.default, (X, 1, False), kept=2),
    Example(aten.log_softmax.int, (X, 2), kept=2),
    Example(aten.cumsum.default, (X, 1), kept=2),
    Example(aten.argsort.default, (X, -1), kept=2),
    Example(aten.argsort.stable, (X,), {"stable": True, "dim": 1}, kept=2),
    Example(aten.topk.default, (X, 3), kept=2),
    Example(aten.topk.default, (X, 2, 1, False), kept=2),
    Example(aten.sort.default, (X, 1), kept=2),
    Example(aten.sort.stable, (X,), {"stable": True, "dim": -1}, kept=2),
    Example(aten.gather.default, (X, 2, _index(3, 5, 4)), kept=2),
    Example(aten.scatter.value, (X, 2, _index(3, 5, 4), 1), kept=2),
    Example(aten.scatter.src, (X, -1, _index(3, 5, 4), _x(3, 5, 4)), kept=2),
    Example(aten.scatter_add.default, (X, 2, _index(3, 5, 4), _x(3, 5, 4)), kept=2),
    Example(aten.index_select.default, (X, 2, torch.tensor([6, 0, 3, 3])), kept=3),
    Example(aten.index.Tensor, (_x(7, 11, 13), [_index(3, 5)]), kept=4),
    Example(aten.index.Tensor, (X, [None, None, torch.tensor([1, 0])]), kept=3),
    Example(aten.sort.default, (_x(5),), kept=0),
    Example(aten.argsort.stable, (_x(5),), {"stable": True}, kept=0),
    Example(aten.index_add.default, (X, 0, torch.tensor([2, 0, 2]), X), kept=2),
    Example(aten.index_put.default, (X, [torch.tensor([2, 0, 1])], _x(3, 5, 7)), kept=0),
    Example(aten.index_copy.default, (X, 1, SLOTS, _x(3, 4, 7)), kept=2),
    Example(focus.clear.default, (X, SLOTS, 1), kept=2),
    Example(focus.extend.default, (X, SLOTS, 1), kept=2),
    Example(focus.extend_mask.default, (_x(3, 1, 4, 5), X, SLOTS, 1), kept=2),
    Example(focus.extend_mask.default, (None, X, SLOTS, 1), kept=0),
    Example(focus.replace.default, (X, _x(3, 9, 7), SLOTS, 1), kept=2),
    Example(focus.clear.default, (X, ROW_SLOTS, 1), kept=2),
    Example(focus.extend.default, (X, ROW_SLOTS, 1), kept=2),
    Example(focus.extend_mask.default, (_x(3, 1, 4, 5), X, ROW_SLOTS, 1), kept=2),
    Example(focus.extend_mask.default, (_x(4, 5), X, ROW_SLOTS, 1), kept=1),
    Example(focus.extend_mask.default, (None, X, ROW_SLOTS, 1), kept=1),
    Example(focus.replace.default, (X, _x(3, 9, 7), ROW_SLOTS, 1), kept=2),
    Example(aten.histc.default, (_x(5), 4, 0, 2), kept=0),
    Example(aten.bincount.default, (_index(5),), kept=0),
    Example(aten._grouped_mm.default, GROUPS, {"offs": ENDS}, kept=0),
    Example(torch.ops.transformers.grouped_mm_fallback.default, (*GROUPS, ENDS), kept=0),
    Example(
        focus.experts.default,
        (_x(5, 7), _index(5, 2) % 4, _x(5, 2), 4 * [_x(11, 7)], 4 * [_x(7, 11)], [], "relu"),
        kept=1,
    ),
    Example(aten.one_hot.default, (_index(3, 5), 7), kept=2),
    Example(aten.repeat_interleave.self_int, (X, 2, 1), kept=3),
    Example(aten.rms_norm.default, (X, [7], _x(7)), kept=2),
    Example(aten.layer_norm.default, (X, [7], _x(7), _x(7)), kept=2),
    Example(aten.scaled_dot_product_attention.default, QKV, kept=4),
    Example(aten.scaled_dot_product_attention.default, (*QKV, _x(3, 1, 5, 7)), kept=4),
    Example(aten.scaled_dot_product_attention.default, (*QKV, _flags(5, 7)), kept=4),
    Example(
        aten.scaled_dot_product_attention.default,
        (*GROUPED, _x(3, 1, 5, 7)),
        {"scale": 0.3, "enable_gqa": True},
        kept=3,
    ),
]
MAKERS = [
    Example(aten.arange.default, (5,), kept=0),
    Example(aten.arange.start, (2, 7), kept=0),
    Example(aten.arange.start_step, (2, 12, 2), kept=0),
    Example(aten.empty_like.default, (X,), kept=3),
    Example(aten.zeros_like.default, (X,), kept=3),
    Example(aten.ones_like.default, (X,), kept=3),
    Example(aten.full_like.default, (X, 2.0), kept=3),
    Example(aten.fill.Scalar, (X, 2.0), kept=3),
    Example(aten.zero.default, (X,), kept=3),
    Example(aten.zeros.default, ([5, 7],), kept=0),
    Example(aten.ones.default, ([5, 7],), kept=0),
    Example(aten.full.default, ([5, 7], 2.0), kept=0),
    Example(aten.empty.memory_format, ([5, 7],), kept=0),
    Example(aten.new_zeros.default, (X, [5, 7]), kept=0),
    Example(aten.new_ones.default, (X, [5, 7]), kept=0),
    Example(aten.new_full.default, (X, [5, 7], 2.0), kept=0),
    Example(aten.new_empty.default, (X, [5, 7]), kept=0),
    Example(aten.eye.default, (5,), kept=0),
    Example(aten.eye.m, (5, 7), kept=0),
    Example(aten.tril.default, (X,), kept=1),
    Example(aten.triu.default, (X, 1), kept=1),
]
EXAMPLES = [*POINTWISE_EXAMPLES, *SHAPES, *MIXERS, *MAKERS]
