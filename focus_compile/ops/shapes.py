"""What the ``focus::`` operators return, as shapes: what the analysis and compilers ask of them.

Each function takes its operator's arguments and returns empty tensors. Run under symbolic sizes,
the operators themselves would compute the same shapes by many steps, which took a third of the time
to compile a model without a compiler behind it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from focus_compile.ops.packing import canvas_shape

__all__ = ["SHAPES"]

Size = int | torch.SymInt


def _like(x: Tensor, *_: Any) -> Tensor:
    """The first operand's shape: clear, experts, replace, retain, visible, line_index."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _resized(x: Tensor, sizes: dict[int, Size]) -> Tensor:
    return x.new_empty([sizes.get(dim, size) for dim, size in enumerate(x.shape)])


def _signal(importance0: Tensor, importance1: Tensor, weights: Tensor, bias: Tensor) -> Tensor:
    return _like(importance0)


def _retain(delta: Tensor, masked: Tensor, *_: Any) -> Tensor:
    return _like(masked)


def _importance(query: Tensor, key: Tensor, masked: Tensor, scale: float) -> Tensor:
    return query.new_empty(masked.shape, dtype=torch.float32)


def _block(key: Tensor, masked: Tensor) -> Tensor:
    return _resized(key, {2: masked.shape[1]})


def _tables(keep: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, length = keep.shape
    shapes: tuple[tuple[Size, ...], ...] = ((batch * length,), keep.shape, keep.shape, (2,))
    order, inverse, rows, sizes = (keep.new_empty(shape, dtype=torch.int64) for shape in shapes)
    return order, inverse, rows, sizes


def _pack(
    x: Tensor, tokens: Tensor, inverse: Tensor, batch_dim: int | None, token_dim: int
) -> Tensor:
    rows: dict[int, Size] = {} if batch_dim is None else {batch_dim: 1}
    return _resized(x, {**rows, token_dim: tokens.shape[0]})


def _repack(x: Tensor, outer_inverse: Tensor, tokens: Tensor, token_dim: int) -> Tensor:
    return _resized(x, {token_dim: tokens.shape[0]})


def _unpack(x: Tensor, index: Tensor, batch_dim: int | None, token_dim: int) -> Tensor:
    batch, most = index.shape
    if batch_dim is None:
        return _resized(x, {token_dim: batch * most})
    return _resized(x, {batch_dim: batch, token_dim: most})


def _join(past: Tensor | None, new: Tensor, tokens: Tensor, stale: Tensor, *_: Any) -> Tensor:
    return _like(stale)


def _store(slots: Tensor, *_: Any) -> Tensor:
    """The operand itself, as it is laid out."""
    return slots.new_empty_strided(slots.shape, slots.stride())


def _restore(
    x: Tensor, tokens: Tensor, keep: Tensor, batch_dim: int | None, token_dim: int
) -> Tensor:
    return x.new_empty(canvas_shape(x, keep, batch_dim, token_dim))


def _causal(masked: Tensor, key: Tensor) -> Tensor:
    return key.new_empty((1, 1, masked.shape[1], key.shape[2]), dtype=torch.bool)


def _site_index(inverse: Tensor, rows: Tensor) -> Tensor:
    return _like(rows)


def _site_mask(
    mask: Tensor | None,
    rows: Tensor,
    visible: Tensor,
    history: int,
    share: int,
    dtype: torch.dtype,
) -> Tensor:
    heads = 1 if mask is None or mask.shape[1] == 1 else mask.shape[1] // share
    batch, most = rows.shape
    return rows.new_empty((batch, heads, share * most, history + visible.shape[1]), dtype=dtype)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, index: Tensor, lines: Tensor, *_: Any
) -> Tensor:
    return query.new_empty((1, lines.shape[0], query.shape[1], value.shape[3]))


def _extend(x: Tensor, index: Tensor, dim: int) -> Tensor:
    rows: dict[int, Size] = {} if index.dim() == 1 else {0: index.shape[0]}
    return _resized(x, {**rows, dim: x.shape[dim] + index.shape[-1]})


def _extend_mask(mask: Tensor | None, past: Tensor, index: Tensor, token_dim: int) -> Tensor:
    length = past.shape[token_dim] + index.shape[-1]
    if mask is None:
        mask = past.new_empty((1, 1, 1, 1), dtype=torch.bool)
    shape: list[Size] = [*mask.shape[:-1], length]
    if index.dim() > 1:
        shape = [index.shape[0], *([1] * (4 - len(shape)) + shape)[1:]]
    return mask.new_empty(shape)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _embedding_shard(weight: Tensor, ids: Tensor, start: int) -> Tensor:
    return weight.new_empty((*ids.shape, weight.shape[1]))


def _gather_ranks(x: Tensor, size: int, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], size))


def _sum_ranks(importance0: Tensor, importance1: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _like(importance0), _like(importance1)


SHAPES: dict[str, Callable[..., Any]] = {
    "attend": _attend,
    "block": _block,
    "causal": _causal,
    "clear": _like,
    "embedding_shard": _embedding_shard,
    "experts": _like,
    "extend": _extend,
    "extend_mask": _extend_mask,
    "gather_ranks": _gather_ranks,
    "importance": _importance,
    "join": _join,
    "line_index": _like,
    "linear": _linear,
    "pack": _pack,
    "pack_rows": _pack,
    "repack": _repack,
    "replace": _like,
    "restore": _restore,
    "retain": _retain,
    "signal": _signal,
    "site_index": _site_index,
    "site_mask": _site_mask,
    "store": _store,
    "sum_ranks": _sum_ranks,
    "tables": _tables,
    "unpack": _unpack,
    "visible": _like,
}
"""By the name of the operator."""
