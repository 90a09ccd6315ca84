"""One denoising step's decisions: which token each masked position would take, and which are kept.

docs/algorithm.md section 7. Plain tensors in, plain tensors out; no model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessorList

__all__ = ["STRATEGIES", "Candidates", "choose", "propose"]

STRATEGIES = ("threshold", "fixed", "sequential")


@dataclass(frozen=True)
class Candidates:
    """Proposed tokens int64 ``[B, T]`` and their probability fp32 ``[B, T]``; -1 where none."""

    tokens: Tensor
    confidence: Tensor


def propose(
    logits: Tensor,
    where: Tensor,
    context: Tensor,
    processors: LogitsProcessorList,
    sample: bool,
    generator: torch.Generator | None,
) -> Candidates:
    """Sampled (or greedy) token and its probability at the positions of ``where``.

    Args:
        logits: ``[B, T, V]``; where: bool ``[B, T]``; context: int64 ``[B, L]`` for the processors.
        sample: draw from the processed distribution; else take its largest, ties to the lowest id.
    """
    rows = where.nonzero()[:, 0]
    scores = (
        processors(context[rows], logits[where].float()) if processors else logits[where].float()
    )
    probabilities = torch.softmax(scores, dim=-1)
    if sample:
        picked = torch.multinomial(probabilities, 1, generator=generator).squeeze(1)
    else:
        picked = probabilities.argmax(-1)
    confidence = probabilities.gather(1, picked.unsqueeze(1)).squeeze(1)
    tokens = torch.zeros(where.shape, dtype=torch.int64, device=where.device)
    values = torch.full(where.shape, -1.0, device=where.device)
    return Candidates(
        tokens.masked_scatter(where, picked), values.masked_scatter(where, confidence)
    )


def choose(
    candidates: Candidates, where: Tensor, strategy: str, threshold: float, count: int
) -> Tensor:
    """Positions to decode, bool ``[B, T]``, at least one in each row that has a candidate.

    ``threshold``: every confidence >= ``threshold``, or else the most confident; ``fixed``: the
    ``count`` most confident; ``sequential``: the ``count`` leftmost. Ties go to the left.
    """
    if strategy == "sequential":
        return where & (where.cumsum(1) <= count)
    order = torch.sort(candidates.confidence, dim=1, descending=True, stable=True).indices
    rank = order.argsort(1)
    if strategy == "fixed":
        return where & (rank < count)
    return where & ((candidates.confidence >= threshold) | (rank == 0))
