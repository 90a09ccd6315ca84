"""Index tables of the fed tokens, made by the host before the prefix runs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Feed", "feed"]


@dataclass(frozen=True)
class Feed:
    """Tables of the processing list (see :func:`focus_compile.packing.tables`), cut to size.

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
    place = fed.reshape(-1).cumsum(0).view(fed.shape) - 1
    most = int(fed.sum(1).max())
    rows = torch.sort((~fed).to(torch.uint8), dim=1, stable=True).indices[:, :most]
    rows = torch.where(fed.gather(1, rows), rows, 0)
    return Feed(fed, tokens, torch.where(fed, place, 0), rows.contiguous())
