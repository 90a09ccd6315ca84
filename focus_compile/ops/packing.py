"""Between the canvas and packed rows: index tables, gathers, and the join with stale slots.

A *canvas* value carries a batch axis and a token axis. Its *packed* form has batch size 1 and, on
the token axis, one row per kept token of the whole batch, in row-major order, with no padding. A
row that keeps nothing is safe. A value without a batch axis (``batch_dim=None``) is shared by all
rows of the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "canvas_shape", "clear", "join", "pack", "pack_rows", "repack", "restore", "store", "unpack",
]  # fmt: skip


def pack(
    x: Tensor, tokens: Tensor, inverse: Tensor, batch_dim: int | None, token_dim: int
) -> Tensor:
    """Canvas -> packed: ``x[..., b, ..., t, ...] -> [..., 1, ..., n, ...]``.

    ``tokens`` int64 ``[N]`` holds flat canvas positions; ``inverse`` gives the canvas its shape.
    """
    length = inverse.shape[1]
    if batch_dim is None:
        return x.index_select(token_dim, tokens % length)
    moved = x.movedim((batch_dim, token_dim), (0, 1))
    picked = moved[tokens // length, tokens % length]
    packed_dim = token_dim - (batch_dim < token_dim)
    return picked.movedim(0, packed_dim).unsqueeze(batch_dim)


def pack_rows(x: Tensor, tokens: Tensor, inverse: Tensor, batch_dim: int, token_dim: int) -> Tensor:
    """One value per row -> packed: ``x[..., b, ..., 1, ...] -> [..., 1, ..., n, ...]``."""
    return x.index_select(batch_dim, tokens // inverse.shape[1]).transpose(batch_dim, token_dim)


def repack(x: Tensor, outer_inverse: Tensor, tokens: Tensor, token_dim: int) -> Tensor:
    """Packed -> packed by fewer tokens: rows of ``x`` that ``tokens`` (a subset) names."""
    return x.index_select(token_dim, outer_inverse.reshape(-1)[tokens])


def unpack(x: Tensor, index: Tensor, batch_dim: int | None, token_dim: int) -> Tensor:
    """Packed -> one line per row: ``y[b, ..., r] = x[index[b, r]]``, index int64 ``[B, R]``."""
    if batch_dim is None:
        return x.index_select(token_dim, index.reshape(-1))
    packed_dim = token_dim - (batch_dim < token_dim)
    line = x.select(batch_dim, 0).movedim(packed_dim, 0)[index]
    return line.movedim((0, 1), (batch_dim, token_dim))


def join(
    past: Tensor | None,
    new: Tensor,
    tokens: Tensor,
    stale: Tensor,
    written: Tensor,
    reuse: Tensor | None,
    token_dim: int,
) -> Tensor:
    """K or V of one layer: the history, then the block, new where computed and else stale.

    Args:
        past: ``[B, G, S, D]``, or None without a history; or the like, with tokens along
            ``token_dim``, at least 1.
        new: packed ``[1, G, N, D]``; tokens: int64 ``[N]``, where its rows belong.
        stale: ``[B, G, S + T, D]``, what this gave in the step before; only its block is read.
        written: bool ``[B, T]``, which slots of the block hold any K or V. The others are not
            read: there the result is 0.
        reuse: bool scalar on the CPU: ``stale`` is of the same history, and nobody else needs it.
            Then the new rows are written into it, and it is the result: nothing is copied. None:
            never.

    Returns:
        ``[B, G, S + T, D]``.
    """
    length = written.shape[1]
    history = 0 if past is None else past.shape[token_dim]
    out = (
        stale
        if reuse is not None and reuse
        else torch.empty_like(stale, memory_format=torch.contiguous_format)
    )
    block = out.narrow(token_dim, history, length)
    if out is not stale:
        if past is not None:
            out.narrow(token_dim, 0, history).copy_(past)
        block.copy_(stale.narrow(token_dim, history, length))
        clear(out, written, token_dim)
    return store(out, new, tokens, length, token_dim)


def clear(slots: Tensor, written: Tensor, token_dim: int, value: float = 0.0) -> None:
    """Write 0, or another value, where the block holds nothing.

    slots: ``[B, G, S + T, D]``; written: bool ``[B, T]``.
    """
    length = written.shape[1]
    block = slots.narrow(token_dim, slots.shape[token_dim] - length, length)
    block.movedim(token_dim, 1).movedim((0, 1), (-2, -1)).masked_fill_(~written, value)


def store(slots: Tensor, new: Tensor, tokens: Tensor, length: int, token_dim: int) -> Tensor:
    """:func:`join` where the slots are the cache: new rows are written there, nothing else is.

    Args:
        slots: ``[B, G, S + T, D]``, any strides but of the last dim: history, and the block as it
            was in the step before, 0 where nobody wrote.
        new, tokens, token_dim: as for :func:`join`; length: T.

    Returns:
        ``slots``. The operator's schema does not say so, as ``join``'s does not.
    """
    block = slots.narrow(token_dim, slots.shape[token_dim] - length, length)
    rows = new[0].movedim(token_dim - 1, 0)
    block.movedim(token_dim, 1)[tokens // length, tokens % length] = rows
    return slots


def restore(
    x: Tensor, tokens: Tensor, keep: Tensor, batch_dim: int | None, token_dim: int
) -> Tensor:
    """Packed -> canvas, 0 where not kept. ``tokens`` int64 ``[N]``; keep: bool ``[B, T]``."""
    length = keep.shape[1]
    shape = canvas_shape(x, keep, batch_dim, token_dim)
    out = x.new_zeros(shape)
    if batch_dim is None:
        return out.index_copy(token_dim, tokens, x)
    dims = (batch_dim, token_dim)
    out.movedim(dims, (0, 1))[tokens // length, tokens % length] = x.movedim(dims, (0, 1))[0]
    return out


def canvas_shape(
    x: Tensor, keep: Tensor, batch_dim: int | None, token_dim: int
) -> list[int | torch.SymInt]:
    """Shape that the packed ``x`` has on the canvas of ``keep`` bool ``[B, T]``."""
    shape: list[int | torch.SymInt] = list(x.shape)
    shape[token_dim] = keep.shape[1]
    if batch_dim is not None:
        shape[batch_dim] = keep.shape[0]
    return shape
