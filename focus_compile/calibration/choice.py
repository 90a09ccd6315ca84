"""The choice among candidates, and the gate of a rescue: docs/algorithm.md section 13."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from focus_compile.calibration.replay import Candidate, Tally
from focus_compile.intervals import wilson

__all__ = ["Judged", "choose", "gate", "judge", "number"]

ENOUGH = 200
"""Evicting steps of rows below which no signal is judged."""
NOT_WORTH_IT = 0.95
"""Predicted cost, relative to dense, from which on nothing is evicted."""
NEAR, DEARER = 1.02, 1.05
"""Within the first of the least cost the paper's signal is taken; an open first step may cost the
second times as much as an evicting one."""
OVER_GATE = 0.03
"""Share of the cost that rescues of steps in which dense is forced, too, may take."""
FORCED = 20
"""Forced steps of dense below which their confidences set no gate."""


@dataclass(frozen=True)
class Judged:
    """A candidate and what its replay gave.

    Attributes:
        predicted: cost relative to dense, in token-layers for each decoded token.
        evicting: row-steps in which something was evicted; hit: share of those in which dense was
            sure of a token that was kept, of those in which it was sure of any, and ``hit_range``
            its 95 % interval; missed: share of the evicting steps in which nothing sure was kept:
            there a rescue comes.
        auc, recall: how the signal ranks what dense decodes, and the share of it among the first
            K; None where there was nothing to rank. kept: share of the masks, in evicting steps.
        picture: the first row of the first block, see :class:`Tally`.
    """

    candidate: Candidate
    predicted: float
    evicting: int
    hit: float | None
    hit_range: tuple[float, float] | None
    missed: float
    auc: float | None
    recall: float | None
    kept: float
    picture: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        data = asdict(self)
        return data | {"candidate": asdict(self.candidate) | {"name": self.candidate.name}}


def judge(candidate: Candidate, tally: Tally, layers: int, block: int) -> Judged:
    hit = tally.hits / tally.sure if tally.sure else None
    return Judged(
        candidate,
        predicted=tally.predicted(layers, block),
        evicting=tally.evicting,
        hit=hit,
        hit_range=None if hit is None else wilson(tally.hits, tally.sure),
        missed=tally.rescued / tally.evicting if tally.evicting else 0.0,
        auc=tally.auc / tally.ranked if tally.ranked else None,
        recall=tally.recall / tally.ranked if tally.ranked else None,
        kept=tally.kept / tally.evicting if tally.evicting else 1.0,
        picture=tuple(tally.picture),
    )


def number(value: float | None, digits: int) -> str:
    """A figure of a candidate as text; ``-`` where there was nothing to measure."""
    return "-" if value is None else f"{value:.{digits}f}"


def choose(judged: Sequence[Judged]) -> tuple[Judged | None, str]:
    """The candidate to use and why; None: do not evict (docs/algorithm.md section 13)."""
    usable = [each for each in judged if each.candidate.signal != "random"]
    known = max(each.evicting for each in usable) >= ENOUGH
    usable = usable if known else [each for each in usable if _is_paper(each)]
    told = "" if known else f"fewer than {ENOUGH} steps evict, too few to judge signals; "
    best = min(usable, key=lambda each: each.predicted)
    if best.predicted >= NOT_WORTH_IT:
        return None, (
            f"{told}do not evict: the cheapest signal ({best.candidate.name}) is predicted to cost "
            f"{best.predicted:.2f} of dense"
        )
    near = [each for each in usable if _is_paper(each) and each.predicted <= NEAR * best.predicted]
    chosen = min(near, key=lambda each: each.predicted) if near else best
    opened = replace(chosen.candidate, first_step="open")
    for each in usable:
        if each.candidate == opened and each.predicted <= DEARER * chosen.predicted:
            chosen = each
    return chosen, (
        f"{told}{chosen.candidate.name}, first step {chosen.candidate.first_step}: predicted to "
        f"cost {chosen.predicted:.2f} of dense"
    )


def _is_paper(each: Judged) -> bool:
    return each.candidate.signal == "delta" and each.candidate.layers == (0, 1)


def gate(tally: Tally, forced: Sequence[float], threshold: float) -> float:
    """The threshold of a rescue, below which rows are taken for misses."""
    share = len(forced) / tally.steps if tally.steps else 0.0
    weight = tally.saved / tally.spent if tally.spent else 0.0
    if not share * weight or len(forced) < FORCED:
        return threshold
    quantile = OVER_GATE / (share * weight)
    if quantile >= 1:
        return threshold
    return min(threshold, sorted(forced)[math.floor(quantile * len(forced))])
