"""Importance of masked tokens: the attention that masked tokens pay each other in one layer.

FOCUS (arXiv 2601.23278) section 3; docs/algorithm.md section 1. These are ordinary eager functions:
they are the specification, the tests hold them against loops, and they are what runs behind the
operators of :mod:`focus_compile.ops` that the passes put into graphs.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["compact", "importance", "rank_of"]


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


def importance(query_BHTD: Tensor, key_BGTD: Tensor, masked: Tensor, scale: float) -> Tensor:
    """Column sums of the pooled attention between the masked tokens of each row.

    For masked tokens i, j of one row (docs/algorithm.md section 1), in fp32::

        s[h,i,j] = scale * <q[i,h], k[j, h // (H/G)]>
        p[h,i,j] = max(s[h,i,j-1], s[h,i,j], s[h,i,j+1])     neighbours in the list of masked tokens
        importance[j] = sum over h and i of softmax_j(p[h,i,:])[j]

    Args:
        query_BHTD: ``[B, H, T, D]``, as the layer's attention receives it (normed and rotated).
        key_BGTD: ``[B, G, T, D]``, likewise, before GQA expansion; G divides H.
        masked: bool ``[B, T]``.
        scale: the scale of the layer's attention.

    Returns:
        fp32 ``[B, T]``; 0 where not masked. A row with m masked tokens sums to m * H.
    """
    batch, heads, tokens, size = query_BHTD.shape
    groups = key_BGTD.shape[1]
    order = compact(masked).view(batch, 1, tokens, 1).expand(batch, groups, tokens, size)
    listed_BGTD = key_BGTD.gather(2, order).float()
    query_BGND = query_BHTD.float().reshape(batch, groups, heads // groups * tokens, size)
    scores = torch.matmul(query_BGND, listed_BGTD.transpose(-1, -2)) * scale

    index = torch.arange(tokens, device=masked.device)
    outside = (index >= masked.sum(1, keepdim=True)).view(batch, 1, 1, tokens)
    lowest = torch.finfo(torch.float32).min
    scores = scores.masked_fill(outside, lowest)
    edge = scores.new_full((*scores.shape[:-1], 1), lowest)
    wide = torch.cat([edge, scores, edge], dim=-1)
    pooled = torch.maximum(torch.maximum(wide[..., :-2], scores), wide[..., 2:])
    attention = torch.softmax(pooled.masked_fill(outside, lowest), dim=-1)
    attention = attention.view(batch, heads, tokens, tokens).masked_fill(
        ~masked.view(batch, 1, tokens, 1), 0.0
    )
    listed = attention.sum((1, 2))
    return torch.where(masked, listed.gather(1, rank_of(masked)), 0.0)
