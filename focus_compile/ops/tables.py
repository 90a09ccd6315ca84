"""Index tables: which places of a batch are masked, fed, retained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Feed", "compact", "feed", "last_position", "rank_of", "retained_tables", "tables"]


def rank_of(keep: Tensor) -> Tensor:
    """Number of kept positions left of each position of its row.

    keep: bool ``[B, T]`` -> int64 ``[B, T]``.
    """
    return keep.cumsum(1) - keep.long()


def compact(keep: Tensor) -> Tensor:
    """Positions of the kept tokens of each row, ascending; the rest of the row is 0.

    keep: bool ``[B, T]`` -> int64 ``[B, T]``.
    """
    order = torch.sort(keep, dim=1, descending=True, stable=True).indices
    index = torch.arange(keep.shape[1], device=keep.device)
    return torch.where(index < keep.sum(1, keepdim=True), order, 0)


def last_position(keep: Tensor) -> Tensor:
    """Largest kept position of each row, -1 if there is none. bool ``[B, T]`` -> int64 ``[B]``."""
    index = torch.arange(keep.shape[1], device=keep.device)
    return torch.where(keep, index, -1).amax(-1)


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


def retained_tables(
    order: Tensor, places: Tensor, count: int, most: int, buckets: Sequence[int] = ()
) -> tuple[Tensor, Tensor]:
    """Tables of :func:`tables` cut to size, or padded to the first bucket that holds them.

    Padding repeats the last kept token, whose row is then computed several times alike, and rounds
    the longest row up to a power of 2.

    Returns:
        ``tokens`` int64 ``[N]``, ``rows`` int64 ``[B, R]``.
    """
    size = next((bucket for bucket in buckets if bucket >= count), None)
    if size is None:
        return order[:count], places[:, :most].contiguous()
    tokens = torch.cat([order[:count], order[count - 1 : count].expand(size - count)])
    return tokens, places[:, : 1 << (most - 1).bit_length()].contiguous()


@dataclass(frozen=True)
class Feed:
    """Tables of the processing list (see :func:`focus_compile.ops.tables.tables`), cut to size.

    ``fed`` bool ``[B, T]``; ``tokens`` int64 ``[N_fed]``; ``inverse`` int64 ``[B, T]``; ``rows``
    int64 ``[B, R_fed]``.
    """

    fed: Tensor
    tokens: Tensor
    inverse: Tensor
    rows: Tensor


def feed(fed: Tensor) -> Feed:
    """Tables for ``fed`` bool ``[B, T]``, which must select at least one token."""
    tokens = fed.reshape(-1).nonzero().squeeze(1)
    packed_row = fed.reshape(-1).cumsum(0).view(fed.shape) - 1
    most = int(fed.sum(1).max())
    rows = torch.sort((~fed).to(torch.uint8), dim=1, stable=True).indices[:, :most]
    rows = torch.where(fed.gather(1, rows), rows, 0)
    return Feed(fed, tokens, torch.where(fed, packed_row, 0), rows.contiguous())
