"""Caches of fixed length: slots, and the keys and values that replace some of them.

Attention does not ask in which order keys come. So new keys are joined behind the slots, as they
are behind a history that grows, and the slots that they replace are hidden. ``index`` is int64
``[T]`` everywhere: the slot of each token of the block, counted from the end where negative.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["clear", "extend", "extend_mask", "replace"]


def clear(past: Tensor, index: Tensor, token_dim: int) -> Tensor:
    """The cache with 0 in the slots that are replaced: what lies there cannot reach an output."""
    return past.index_fill(token_dim, _from_start(index, past.shape[token_dim]), 0)


def extend(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """What stands beside M slots (a table by position), for slots and new keys: M + T."""
    return torch.cat([x, x.index_select(dim, _from_start(index, x.shape[dim]))], dim)


def extend_mask(mask: Tensor | None, past: Tensor, index: Tensor, token_dim: int) -> Tensor:
    """A mask over slots, for slots and new keys; replaced slots are hidden.

    Args:
        mask: ``[..., T or 1, M or 1]``, bool (True: visible) or additive; None: all is visible.
        past: the cache, M slots along ``token_dim``.

    Returns:
        ``[..., T or 1, M + T]``, of the mask's dtype; bool ``[1, 1, 1, M + T]`` without a mask.
    """
    length = past.shape[token_dim]
    index = _from_start(index, length)
    if mask is None:
        mask = torch.ones((1, 1, 1, length), dtype=torch.bool, device=past.device)
    mask = mask.expand(*mask.shape[:-1], length)
    replaced = torch.zeros(length, dtype=torch.bool, device=mask.device).index_fill(0, index, True)
    nothing = False if mask.dtype == torch.bool else -torch.inf
    return torch.cat([mask.masked_fill(replaced, nothing), mask.index_select(-1, index)], -1)


def replace(past: Tensor, joined: Tensor, index: Tensor, token_dim: int) -> Tensor:
    """The cache after the call: M slots, with the block's part of ``joined`` (M + T) in its own."""
    block = joined.narrow(token_dim, past.shape[token_dim], index.shape[0])
    return past.index_copy(token_dim, _from_start(index, past.shape[token_dim]), block)


def _from_start(index: Tensor, length: int) -> Tensor:
    return torch.where(index < 0, index + length, index)
