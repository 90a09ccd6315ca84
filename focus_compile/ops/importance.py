"""Importance of masked tokens: the attention that masked tokens pay each other in one layer.

FOCUS (arXiv 2601.23278) section 3; docs/algorithm.md section 1. These are ordinary eager functions:
they are the specification, the tests hold them against loops, and they are what runs behind the
operators of :mod:`focus_compile.ops.library` that the passes put into graphs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d

from focus_compile.ops.tables import compact, rank_of

__all__ = ["importance"]


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
    outside = torch.arange(tokens, device=masked.device) >= masked.sum(1, keepdim=True)
    order = compact(masked)
    order = torch.where(outside, order[:, :1], order)  # the first masked one: no other can be NaN
    lines = torch.arange(batch * groups, device=masked.device).view(batch, groups, 1) * tokens
    listed = (lines + order.unsqueeze(1)).view(-1)
    key = key_BGTD.reshape(-1, size).index_select(0, listed).float().view(-1, tokens, size)
    query = query_BHTD.float().reshape(batch * groups, -1, size)
    scores = torch.bmm(query, key.transpose(1, 2)).view(batch, -1, tokens) * scale

    hidden = query.new_zeros(outside.shape).masked_fill(outside, -1e30).unsqueeze(1)
    pooled = max_pool1d(scores + hidden, kernel_size=3, stride=1, padding=1)
    attention = torch.softmax(pooled + hidden, dim=-1).view(batch, heads, tokens, tokens)
    attention = attention.masked_fill(~masked.view(batch, 1, tokens, 1), 0.0)
    return torch.where(masked, attention.sum((1, 2)).gather(1, rank_of(masked)), 0.0)
