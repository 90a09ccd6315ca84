"""Caches of fixed length: slots, and the keys and values that replace some of them.

Attention does not ask in which order keys come. So new keys are joined behind the slots, as they
are behind a history that grows, and the slots that they replace are hidden. ``index`` is int64
``[T]`` everywhere: the slot of each token of the block, counted from the end where negative; or
``[B, T]``, where rows have slots of their own, and batch is the first dim of whatever has slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["clear", "extend", "extend_mask", "replace"]


def clear(past: Tensor, index: Tensor, token_dim: int) -> Tensor:
    """The cache with 0 in the slots that are replaced: what lies there cannot reach an output."""
    index = _from_start(index, past.shape[token_dim])
    if index.dim() == 1:
        return past.index_fill(token_dim, index, 0)
    return past.scatter(token_dim, _spread(index, past, token_dim), 0)


def extend(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """What stands beside M slots (a table by position), for slots and new keys: M + T.

    Where rows have slots of their own, ``x`` is ``[B or 1, ...]``, and the result ``[B, ...]``.
    """
    return torch.cat(_with_picked(x, _from_start(index, x.shape[dim]), dim), dim)


def extend_mask(mask: Tensor | None, past: Tensor, index: Tensor, token_dim: int) -> Tensor:
    """A mask over slots, for slots and new keys; replaced slots are hidden.

    Args:
        mask: ``[..., T or 1, M or 1]``, bool (True: visible) or additive; None: all is visible.
        past: the cache, M slots along ``token_dim``.

    Returns:
        ``[..., T or 1, M + T]``, of the mask's dtype; bool ``[1, 1, 1, M + T]`` without a mask.
        Where rows have slots of their own, it has four dims, and B rows.
    """
    length = past.shape[token_dim]
    index = _from_start(index, length)
    if mask is None:
        mask = torch.ones((1, 1, 1, length), dtype=torch.bool, device=past.device)
    mask = mask.expand(*mask.shape[:-1], length)
    replaced = torch.zeros((*index.shape[:-1], length), dtype=torch.bool, device=mask.device)
    replaced = replaced.scatter(-1, index, True)
    if index.dim() > 1:
        mask = mask[(None,) * (4 - mask.dim())]
        replaced = replaced[:, None, None]
    nothing = False if mask.dtype == torch.bool else -torch.inf
    slots, block = _with_picked(mask, index, mask.dim() - 1)
    return torch.cat([slots.masked_fill(replaced, nothing), block], -1)


def replace(past: Tensor, joined: Tensor, index: Tensor, token_dim: int) -> Tensor:
    """The cache after the call: M slots, with the block's part of ``joined`` (M + T) in its own."""
    length = past.shape[token_dim]
    block = joined.narrow(token_dim, length, index.shape[-1])
    index = _from_start(index, length)
    if index.dim() == 1:
        return past.index_copy(token_dim, index, block)
    return past.scatter(token_dim, _spread(index, past, token_dim), block)


def _with_picked(x: Tensor, index: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """``x``, and what stands at ``index`` in it."""
    if index.dim() == 1:
        return x, x.index_select(dim, index)
    x = x.expand(index.shape[0], *x.shape[1:])
    return x, x.gather(dim, _spread(index, x, dim))


def _spread(index: Tensor, x: Tensor, dim: int) -> Tensor:
    """Places ``[B, T]`` along a dim of ``x``, the same along all others but the first."""
    sizes = [1] * x.dim()
    sizes[0], sizes[dim] = index.shape
    return index.view(sizes).expand(*x.shape[:dim], index.shape[1], *x.shape[dim + 1 :])


def _from_start(index: Tensor, length: int) -> Tensor:
    return torch.where(index < 0, index + length, index)
