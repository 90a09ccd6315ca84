"""Between the canvas and packed rows: index tables, gathers, and the merge with stale slots.

A *canvas* value carries a batch axis and a token axis. Its *packed* form has batch size 1 and, on
the token axis, one row per kept token of the whole batch, in row-major order, with no padding.
Everything here is a gather or a ``where``: nothing is mutated, and a row that keeps nothing is
safe. A value without a batch axis (``batch_dim=None``) is shared by all rows of the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from focus_compile.importance import compact

__all__ = ["merge", "pack", "pack_rows", "repack", "restore", "tables", "unpack"]


def tables(keep: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Index tables of the tokens that ``keep`` selects.

    Args:
        keep: bool ``[B, T]``.

    Returns:
        ``tokens`` int64 ``[B * T]``: flat canvas position of the n-th kept token, first N valid;
        ``inverse`` int64 ``[B, T]``: packed row of a kept position, else 0;
        ``rows`` int64 ``[B, T]``: position of the r-th kept token of its row, else 0;
        ``sizes`` int64 ``[2]``: N, the kept tokens of the batch, and R, the most of any row.
    """
    flat = keep.reshape(-1)
    order = torch.sort(flat, descending=True, stable=True).indices
    inverse = torch.where(keep, (flat.cumsum(0) - 1).view(keep.shape), 0)
    return order, inverse, compact(keep), torch.stack([flat.sum(), keep.sum(1).amax()])


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
    at = token_dim - (batch_dim < token_dim)
    return picked.movedim(0, at).unsqueeze(batch_dim)


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
    at = token_dim - (batch_dim < token_dim)
    line = x.select(batch_dim, 0).movedim(at, 0)[index]
    return line.movedim((0, 1), (batch_dim, token_dim))


def merge(
    x: Tensor,
    inverse: Tensor,
    keep: Tensor,
    slots: Tensor,
    written: Tensor,
    batch_dim: int | None,
    token_dim: int,
) -> Tensor:
    """K or V of a block: new where kept, else what the slot holds, else 0 (never unwritten memory).

    Args:
        x: packed; inverse: int64 ``[B, T]``; keep, written: bool ``[B, T]``.
        slots: the block's K or V of earlier steps, in canvas layout.
    """
    canvas = unpack(x, inverse, batch_dim, token_dim)
    old = torch.where(_spread(written, canvas, batch_dim, token_dim), slots, 0.0)
    return torch.where(_spread(keep, canvas, batch_dim, token_dim), canvas, old)


def restore(
    x: Tensor, inverse: Tensor, keep: Tensor, batch_dim: int | None, token_dim: int
) -> Tensor:
    """Packed -> canvas, 0 where not kept."""
    canvas = unpack(x, inverse, batch_dim, token_dim)
    return torch.where(_spread(keep, canvas, batch_dim, token_dim), canvas, 0)


def _spread(flags: Tensor, like: Tensor, batch_dim: int | None, token_dim: int) -> Tensor:
    """bool ``[B, T]`` viewed so that it broadcasts along the batch and token axes of ``like``."""
    shape: list[int] = [1] * like.dim()
    if batch_dim is not None:
        shape[batch_dim] = flags.shape[0]
    shape[token_dim] = flags.shape[1]
    if batch_dim is not None and batch_dim > token_dim:
        flags = flags.transpose(0, 1)
    return flags.reshape(shape)
