"""The mathematics of FOCUS (arXiv 2601.23278) as plain loops over one row.

Sections cited here are those of docs/algorithm.md. Positions are 0-based block offsets; `M` is the
ascending list of masked positions that were fed. Every decision comes with a *margin*: how far the
nearest quantity is from flipping it, so that a test can recognise a near tie.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """At least fp32: scores, softmaxes and norms of bf16 models are computed in fp32."""
    return torch.promote_types(dtype, torch.float32)


def importance(
    query_MHD: Tensor, key_MGD: Tensor, scale: float, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Section 1: what attention each masked token receives from the masked tokens, [m]."""
    tokens, heads, _ = query_MHD.shape
    group = heads // key_MGD.shape[1]
    query, key = query_MHD.to(dtype), key_MGD.to(dtype)
    outside = torch.tensor([-math.inf], dtype=dtype)
    total = torch.zeros(tokens, dtype=dtype)
    for h in range(heads):
        for i in range(tokens):
            score = scale * (key[:, h // group] @ query[i, h])
            padded = torch.cat([outside, score, outside])
            pooled = torch.stack([padded[j : j + 3].max() for j in range(tokens)])
            total = total + torch.softmax(pooled, dim=0)
    return total


def average(decoded_sum: int, decode_steps: int) -> float:
    """Section 2: decoded tokens per productive step; 1 before the first of them."""
    return decoded_sum / decode_steps if decode_steps > 0 else 1.0


def count_productive(decoded: Sequence[int]) -> tuple[int, int]:
    """Section 2: (decoded_sum, decode_steps) of a block; steps that decode nothing do not count."""
    productive = [n for n in decoded if n > 0]
    return sum(productive), len(productive)


def target(masked_count: int, avg: float, alpha: float) -> int:
    """Section 2: K, with the product and its ceil in fp32."""
    if masked_count == 0:
        return 0
    product = np.float32(max(avg, 1.0)) * np.float32(alpha)
    if product >= masked_count:
        return masked_count
    return max(1, int(np.ceil(product)))


@dataclass(frozen=True)
class Choice:
    """Ascending indices, and the gap by which the nearest value misses changing them.

    When every value may be wrong by eps, a choice by mean + std can flip if margin <= 3 eps, one by
    rank if margin <= 2 eps.
    """

    indices: list[int]
    margin: float


def select(delta: Tensor, k: int) -> Choice:
    """Section 3: indices into M.

    With A = {delta >= mean + std} the margin is exact about what would change the *set*:
    |A| > K: any delta crossing the threshold; |A| = K: only one from below (if a member drops out,
    the top-K are the same set); |A| < K: the gap between the K-th and the next largest.
    """
    count = len(delta)
    if not (k > 0 and count > k):
        return Choice(list(range(count)), math.inf)
    mean = delta.mean()
    threshold = mean + ((delta - mean) ** 2).mean().sqrt()
    above = [j for j in range(count) if delta[j] >= threshold]
    if len(above) > k:
        return Choice(above, float((delta - threshold).abs().min()))
    if len(above) == k:
        return Choice(above, min(float(threshold - delta[j]) for j in set(range(count)) - {*above}))
    values = delta.tolist()
    ranked = sorted(range(count), key=lambda j: (-values[j], j))
    return Choice(sorted(ranked[:k]), values[ranked[k - 1]] - values[ranked[k]])


def enforce(positions: Sequence[int], keep: set[int], progress: int) -> list[int]:
    """Section 4, items 1-3: the kept positions of M, given those that selection kept."""
    kept = set(keep)
    for left, right in pairwise(positions):
        if right in keep and right - left == 1:
            kept.add(left)
    if not kept:
        kept = set(positions)
    rightmost = max(kept, default=-1)
    kept |= {p for p in positions if progress < p < rightmost}
    return sorted(kept)


@dataclass(frozen=True)
class Eviction:
    """What sections 2-4 decide for one row in one step."""

    k: int
    kept: list[int]
    rightmost: int
    progress: int
    margin: float


def evict(
    fed: Sequence[int],
    mask_flags: Sequence[bool],
    delta: Tensor,
    avg: float,
    alpha: float,
    progress: int,
    choose: Callable[[Tensor, int], Choice] = select,
) -> Eviction:
    """Sections 2-4: target, selection and enforcement over the fed positions of one row."""
    masked = [p for p, flag in zip(fed, mask_flags, strict=True) if flag]
    k = target(len(masked), avg, alpha)
    choice = choose(delta, k)
    kept_masked = enforce(masked, {masked[j] for j in choice.indices}, progress)
    decoded = [p for p, flag in zip(fed, mask_flags, strict=True) if not flag]
    kept = sorted([*kept_masked, *decoded])
    rightmost = kept[-1]
    return Eviction(k, kept, rightmost, max(progress, rightmost), choice.margin)


def finalise(
    masked_as_fed: Sequence[bool], fed: Sequence[int], final: Sequence[bool]
) -> list[bool]:
    """Section 6, item 3: which positions are final after a forward.

    A right neighbour that was not fed now is final, hence was fed decoded earlier.
    """
    after = list(final)
    for p in fed:
        right_ready = p + 1 == len(after) or (not masked_as_fed[p + 1])
        after[p] = after[p] or (not masked_as_fed[p] and right_ready)
    return after


def unmask(
    confidence: Sequence[float],
    candidates: Sequence[bool],
    threshold: float,
    strict: bool = False,
) -> Choice:
    """Section 7: all candidates that pass the threshold, else the most confident one (leftmost).

    The margin is exact about the set: with at most one passing, it is the most confident one
    whether it passes or not, so only the runner-up can change the choice.
    """
    indices = [j for j, flag in enumerate(candidates) if flag]
    if not indices:
        return Choice([], math.inf)
    ranked = sorted(indices, key=lambda j: (-confidence[j], j))
    passing = [
        j
        for j in indices
        if confidence[j] > threshold or (not strict and confidence[j] == threshold)
    ]
    if len(passing) > 1:
        return Choice(passing, min(abs(confidence[j] - threshold) for j in indices))
    if len(indices) == 1:
        return Choice(indices, math.inf)
    bar = threshold if passing else confidence[ranked[0]]
    return Choice(ranked[:1], bar - confidence[ranked[1]])


def most_confident(confidence: Sequence[float], candidates: Sequence[bool], count: int) -> Choice:
    """Strategy `fixed`: the `count` most confident candidates, ties to the leftmost."""
    indices = [j for j, flag in enumerate(candidates) if flag]
    ranked = sorted(indices, key=lambda j: (-confidence[j], j))
    if len(ranked) <= count:
        return Choice(indices, math.inf)
    return Choice(sorted(ranked[:count]), confidence[ranked[count - 1]] - confidence[ranked[count]])


def leftmost(candidates: Sequence[bool], count: int) -> Choice:
    """Strategy `sequential`: the first `count` candidates."""
    return Choice([j for j, flag in enumerate(candidates) if flag][:count], math.inf)


@dataclass(frozen=True)
class Greedy:
    """The most likely token, its probability, and its lead in logits over the runner-up."""

    token: int
    confidence: float
    margin: float


def greedy(logits_V: Tensor) -> Greedy:
    """Section 7: argmax (ties to the lowest id) and its softmax probability."""
    logits = logits_V.to(compute_dtype(logits_V.dtype))
    top, second = torch.topk(logits, 2).values.tolist()
    token = int((logits == logits.max()).nonzero()[0])
    return Greedy(token, float(torch.softmax(logits, dim=0)[token]), top - second)
