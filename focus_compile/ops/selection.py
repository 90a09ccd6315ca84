"""Which tokens of a block are retained: target, selection and enforcement.

FOCUS (arXiv 2601.23278) section 3; docs/algorithm.md sections 2-4. Eager functions over ``[B, T]``:
the specification, and what runs behind the operator that the ``retain`` pass puts into the graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from focus_compile.ops.tables import last_position

__all__ = ["enforce", "retain", "select", "signal", "target"]


def signal(importance0: Tensor, importance1: Tensor, weights: Tensor, bias: Tensor) -> Tensor:
    """The ranking signal: ``weights[0] * importance0 + weights[1] * importance1 + bias``.

    FOCUS ranks by ``importance1 - importance0`` (weights -1 and 1, bias 0); other values serve
    ablations and the replay of recorded traces. fp32 ``[B, T]``, weights ``[2]``.
    """
    return weights[0] * importance0 + weights[1] * importance1 + bias


def target(masked_count: Tensor, average: Tensor, alpha: Tensor) -> Tensor:
    """Number of masked tokens to keep: ``min(m, max(1, ceil(max(average, 1) * alpha)))``.

    docs/algorithm.md section 2; product and ceil in fp32.

    Args:
        masked_count: int64 ``[B]``, m.
        average: fp32 ``[B]``, tokens decoded per decoding step of this block so far.
        alpha: fp32 scalar, at least 1.

    Returns:
        int64 ``[B]``; 0 where m is 0.
    """
    budget = torch.ceil(average.clamp_min(1.0) * alpha).clamp_max(2.0**31).to(torch.int64)
    return torch.minimum(masked_count, budget.clamp_min(1))


def select(delta: Tensor, masked: Tensor, count: Tensor) -> Tensor:
    """Masked tokens at least one standard deviation above the mean, or else the ``count`` largest.

    docs/algorithm.md section 3: ``A = {j : delta[j] >= mean + std}`` over the masked tokens
    (population std, fp32); A if it holds ``count`` tokens, else the ``count`` largest deltas, ties
    to the leftmost. A delta that is NaN says nothing: its token is kept.

    Args:
        delta: fp32 ``[B, T]``; masked: bool ``[B, T]``; count: int64 ``[B]``.

    Returns:
        bool ``[B, T]``, a subset of ``masked``.
    """
    number = masked.sum(-1, keepdim=True).clamp_min(1)
    mean = torch.where(masked, delta, 0.0).sum(-1, keepdim=True) / number
    spread = torch.where(masked, delta - mean, 0.0).square().sum(-1, keepdim=True) / number
    above = masked & (delta >= mean + spread.sqrt())
    order = torch.sort(delta, dim=1, descending=True, stable=True).indices
    masked_first = torch.sort(masked.gather(1, order), dim=1, descending=True, stable=True).indices
    index = torch.arange(masked.shape[1], device=masked.device).expand_as(order)
    rank = torch.empty_like(order).scatter(1, order.gather(1, masked_first), index)
    largest = masked & ((rank < count.unsqueeze(1)) | delta.isnan())
    return torch.where(above.sum(-1, keepdim=True) >= count.unsqueeze(1), above, largest)


def enforce(kept: Tensor, masked: Tensor, progress: Tensor) -> Tensor:
    """Add what correctness needs to a selection: left neighbour, never empty, no hole in the K/V.

    docs/algorithm.md section 4, rules 1-3.

    Args:
        kept: bool ``[B, T]``, a subset of ``masked``; masked: bool ``[B, T]``.
        progress: int64 ``[B]``, the largest position whose K/V every layer has seen in this block.

    Returns:
        bool ``[B, T]``, a subset of ``masked``.
    """
    index = torch.arange(masked.shape[1], device=masked.device)
    right_kept = torch.cat([kept[:, 1:], torch.zeros_like(kept[:, :1])], dim=1)
    kept = kept | (right_kept & masked)
    kept = torch.where(kept.any(-1, keepdim=True), kept, masked)
    hole = (index > progress.unsqueeze(1)) & (index < last_position(kept).unsqueeze(1))
    return kept | (masked & hole)


def retain(
    delta: Tensor, masked: Tensor, fed: Tensor, progress: Tensor, average: Tensor, alpha: Tensor
) -> Tensor:
    """The tokens that layers after the cut compute: docs/algorithm.md sections 2-4 in one.

    Args:
        delta: fp32 ``[B, T]``, the ranking signal: importance at layer 1 minus that at layer 0.
        masked, fed: bool ``[B, T]``; fed is the processing list, a superset of masked.
        progress: int64 ``[B]``; average: fp32 ``[B]``; alpha: fp32 scalar.

    Returns:
        bool ``[B, T]``: kept masked tokens, and every fed token that is decoded.
    """
    number = masked.sum(-1)
    count = target(number, average, alpha)
    chosen = enforce(select(delta, masked, count), masked, progress)
    evict = (count > 0) & (number > count)
    return torch.where(evict.unsqueeze(1), chosen, masked) | (fed & ~masked)
