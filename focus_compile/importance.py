"""Importance of masked tokens: the attention that masked tokens pay each other in one layer.

FOCUS (arXiv 2601.23278) section 3; docs/algorithm.md section 1. These are ordinary eager functions:
they are the specification, the tests hold them against loops, and the passes put them into graphs
through the operators of :mod:`focus_compile.ops`.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["compact", "importance", "rank_of"]


def rank_of(keep: Tensor) -> Tensor:
    """Number of kept positions left of each position of its row.

    keep: bool ``[B, T]`` -> int64 ``[B, T]``. A pairwise count: it fuses, where a scan would not.
    """
    tokens = keep.shape[1]
    index = torch.arange(tokens, device=keep.device)
    left = index.unsqueeze(0) < index.unsqueeze(1)
    return (keep.unsqueeze(1) & left.unsqueeze(0)).sum(-1)


def compact(keep: Tensor) -> Tensor:
    """Positions of the kept tokens of each row, ascending; the rest of the row is 0.

    keep: bool ``[B, T]`` -> int64 ``[B, T]``.
    """
    tokens = keep.shape[1]
    index = torch.arange(tokens, device=keep.device)
    slot = index.view(1, tokens, 1)
    hit = keep.unsqueeze(1) & (rank_of(keep).unsqueeze(1) == slot)
    return (hit * index.view(1, 1, tokens)).sum(-1)


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
    query_BGHTD = query_BHTD.float().view(batch, groups, heads // groups, tokens, size)
    scores = torch.matmul(query_BGHTD, listed_BGTD.unsqueeze(2).transpose(-1, -2)) * scale

    count = masked.sum(-1)
    index = torch.arange(tokens, device=masked.device)
    outside = (index.unsqueeze(0) >= count.unsqueeze(1)).view(batch, 1, 1, 1, tokens)
    lowest = torch.finfo(torch.float32).min
    scores = scores.masked_fill(outside, lowest)
    left = scores[..., torch.where(index > 0, index - 1, 0)]
    right = scores[..., torch.where(index + 1 < tokens, index + 1, index)]
    pooled = torch.maximum(torch.maximum(left, scores), right).masked_fill(outside, lowest)
    attention = torch.softmax(pooled, dim=-1)
    asked = masked.view(batch, 1, 1, tokens, 1)
    listed = torch.where(asked, attention, 0.0).sum((1, 2, 3))
    return torch.where(masked, listed.gather(1, rank_of(masked)), 0.0)
