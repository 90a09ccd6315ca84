"""First step, rescue and signals (docs/algorithm.md, sections 10-12) of one row, as plain loops.

Confidences, thresholds and scores are compared in fp32. Lists of positions are ascending.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from tests.reference import algorithm
from tests.reference.algorithm import Choice

FirstStep = Literal["evict", "open", "auto"]
Strategy = Literal["threshold", "fixed", "sequential"]
Signal = Literal["delta", "importance", "position", "confidence"] | tuple[float, float]


def opens_next(opens: bool, had_masks: bool, first_decoded: int, alpha: float) -> bool:
    """Section 10, rule 2: the flag of the block that follows a committed one."""
    if not had_masks:
        return opens
    return first_decoded > max(1, int(np.ceil(np.float32(alpha))))


def keeps_all(first_step: FirstStep, warm: bool, opens: bool, session: bool = True) -> bool:
    """Section 10: whether this step keeps all of P, whatever sections 2-4 say."""
    if warm or not session:
        return False
    return first_step == "open" or (first_step == "auto" and opens)


def at_least(value: float, bar: float) -> bool:
    """In fp32; False for a NaN."""
    return bool(np.float32(value) >= np.float32(bar))


def sureness(logits_V: Tensor, mask_id: int | None) -> float:
    """Section 11.1: c[p], the largest probability of a token that is not the mask."""
    logits = logits_V.to(algorithm.compute_dtype(logits_V.dtype), copy=True)
    if mask_id is not None:
        logits[mask_id] = -math.inf
    return float(torch.softmax(logits, dim=0).max())


@dataclass(frozen=True)
class Judge:
    """What section 11 has to know of the decoding that follows."""

    mask_id: int | None
    strategy: Strategy = "threshold"
    count: int = 1
    """Tokens per step of the strategies `fixed` and `sequential`."""
    shifted: bool = False
    """The token at p is predicted by row p - 1."""


@dataclass(frozen=True)
class Need:
    """Section 11, items 1-2, and how near c* is to another decision."""

    evicted: list[int]
    c_star: float
    """NaN where it is not defined: no candidate, nothing evicted, `sequential`."""
    flag: bool
    margin: float


def need(
    masked: Sequence[int],
    kept: Sequence[int],
    confidence: Mapping[int, float],
    tau: float,
    judge: Judge,
    before: float | None = None,
) -> Need:
    """Whether a row is in need. `confidence`: of kept rows; `before`: of the row before the block.

    A candidate's NaN makes c* NaN, hence the row one in need.
    """
    evicted = [p for p in masked if p not in kept]
    if not evicted:
        return Need([], math.nan, False, math.inf)
    source = {p: p - 1 if judge.shifted else p for p in masked}
    if judge.strategy == "sequential":
        lost = any(source[p] in evicted for p in masked[: judge.count])
        return Need(evicted, math.nan, lost, math.inf)
    known = {p: confidence[p] for p in kept} | ({} if before is None else {-1: before})
    found = [known[source[p]] for p in masked if source[p] in known]
    rank = judge.count if judge.strategy == "fixed" else 1
    if len(found) < rank or any(math.isnan(c) for c in found):
        return Need(evicted, math.nan, True, math.inf)
    c_star = sorted(found, reverse=True)[rank - 1]
    margin = math.inf if tau == 0 else abs(c_star - tau)  # no probability is below 0
    return Need(evicted, c_star, not at_least(c_star, tau), margin)


@dataclass(frozen=True)
class Rescued:
    """Section 11, items 4-5."""

    retained: list[int]
    written: list[bool]
    progress: int


def rescue(
    kept: Sequence[int], evicted: Sequence[int], written: Sequence[bool], progress: int
) -> Rescued:
    """What a row in need becomes. `written`, `progress`: after the first pass."""
    return Rescued(
        sorted([*kept, *evicted]),
        [held or p in evicted for p, held in enumerate(written)],
        max([progress, *evicted]),
    )


def visible_slots(written: Sequence[bool], bound: int | None) -> list[bool]:
    """Section 5.4: slots that hold K/V, up to `bound` (None: visibility "written")."""
    return [held and (bound is None or p <= bound) for p, held in enumerate(written)]


@dataclass(frozen=True)
class Remembered:
    """What the signal "confidence" knows of one position."""

    confidence: float
    step: int


Memory = dict[int, Remembered]


def remember(
    memory: Memory, step: int, confidence: Mapping[int, float], tokens: int, shifted: bool
) -> Memory:
    """Section 12: after a step whose computed rows had these confidences."""
    shift = 1 if shifted else 0
    new = {p + shift: Remembered(c, step) for p, c in confidence.items() if p + shift < tokens}
    return memory | new


def score(
    signal: Signal,
    positions: Sequence[int],
    importance0_M: Tensor,
    importance1_M: Tensor,
    memory: Memory,
    bias_M: Tensor | None = None,
) -> Tensor:
    """Section 12: the values that take the place of delta."""
    match signal:
        case "delta":
            found = importance1_M - importance0_M
        case "importance":
            found = importance1_M
        case "position":
            found = torch.tensor([-float(p) for p in positions])
        case "confidence":
            found = torch.tensor([memory[p].confidence if p in memory else 0.0 for p in positions])
        case (weight0, weight1):
            found = weight0 * importance0_M + weight1 * importance1_M
    return found if bias_M is None else found + bias_M


def last_computed(memory: Memory, positions: Iterable[int]) -> list[int]:
    """The step of each position's confidence; -1 where it has none."""
    return [memory[p].step if p in memory else -1 for p in positions]


def select(
    signal: Signal, score_M: Tensor, k: int, last: Sequence[int], biased: bool = False
) -> Choice:
    """Section 3 with a signal's own ties: indices into M. `last`: see `last_computed`."""
    count = len(score_M)
    if signal not in ("position", "confidence"):
        choice = algorithm.select(score_M, k)
        # Importances of one or two tokens are equal by construction.
        return Choice(choice.indices, math.inf if count <= 2 and not biased else choice.margin)
    if not (k > 0 and count > k):
        return Choice(list(range(count)), math.inf)
    if signal == "confidence":
        if not biased and all(step < 0 for step in last):
            return Choice(list(range(count)), math.inf)  # zeros: mean + std is 0, A is all of M
        mean = score_M.mean()
        if int((score_M >= mean + ((score_M - mean) ** 2).mean().sqrt()).sum()) >= k:
            return algorithm.select(score_M, k)
    values = score_M.tolist()
    ranked = sorted(range(count), key=lambda j: (-values[j], -last[j], j))
    inside, outside = ranked[k - 1], ranked[k]
    exact = not biased and (signal == "position" or last[inside] == last[outside] == -1)
    margin = math.inf if exact else values[inside] - values[outside]
    return Choice(sorted(ranked[:k]), margin)


def evict_named(
    fed: Sequence[int],
    mask_flags: Sequence[bool],
    score_M: Tensor,
    avg: float,
    alpha: float,
    progress: int,
    required: Collection[int],
    least: int,
    choose: Callable[[Tensor, int], Choice],
) -> algorithm.Eviction:
    """Section 15: some positions are kept in any case, the budget is for others."""
    masked = [p for p, flag in zip(fed, mask_flags, strict=True) if flag]
    budget = max(float(np.ceil(np.float32(max(avg, 1.0)) * np.float32(alpha))), 1.0, float(least))
    named = [p for p in masked if p in required]
    k = int(min(budget + len(named), len(masked)))
    if not named:
        choice = choose(score_M, k)
        keep, margin = {masked[j] for j in choice.indices}, choice.margin
    else:
        free = [j for j, p in enumerate(masked) if p not in required]
        ranked = sorted(free, key=lambda j: (-float(score_M[j]), j))
        count = k - len(named)
        keep = {masked[j] for j in ranked[:count]} | {*named}
        margin = math.inf
        if 0 < count < len(ranked):
            margin = float(score_M[ranked[count - 1]] - score_M[ranked[count]])
    kept = sorted(
        [
            *algorithm.enforce(masked, keep, progress),
            *(p for p, flag in zip(fed, mask_flags, strict=True) if not flag),
        ]
    )
    return algorithm.Eviction(k, kept, kept[-1], max(progress, kept[-1]), margin)
