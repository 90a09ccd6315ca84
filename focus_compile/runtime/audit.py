"""A step now and then, computed densely beside: what did eviction miss, and what came out else?

docs/algorithm.md section 14. It measures and changes nothing; rescue protects.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from focus_compile.intervals import wilson
from focus_compile.runtime.predictions import Predictions

__all__ = ["Audit"]


@dataclass
class Audit:
    """Counts over the steps that were computed densely as well.

    Attributes:
        every: one step in so many is one of them; calls: steps so far, of all generations.
        steps: how many were audited.
        rows: rows of them in which a masked token was evicted and dense was sure of one; missed:
            those of these in which none of dense's sure tokens was retained at first; unrescued:
            and none after rescue.
        calibrated: the interval of ``hit_range`` that a calibration has seen; None: there is none.
        decided: tokens that FOCUS could decode in these steps, in all rows: the sure ones, else the
            surest of a row; differ: those of which dense makes another token.
    """

    every: int
    calls: int = 0
    steps: int = 0
    rows: int = 0
    missed: int = 0
    unrescued: int = 0
    decided: int = 0
    differ: int = 0
    calibrated: tuple[float, float] | None = None

    def next_is_due(self) -> bool:
        """Count a step; whether it is one of them."""
        self.calls += 1
        return self.calls % self.every == 0

    @property
    def hit_range(self) -> tuple[float, float] | None:
        """The 95 % interval of the share of rows in which a sure token was retained at first."""
        return wilson(self.rows - self.missed, self.rows) if self.rows else None

    @property
    def differ_range(self) -> tuple[float, float] | None:
        """The 95 % interval of the share of decided tokens of which dense makes another."""
        return wilson(self.differ, self.decided) if self.decided else None

    @property
    def misses_more(self) -> bool:
        """Whether more is missed than the calibration has seen, and the intervals do not meet."""
        found, seen = self.hit_range, self.calibrated
        return found is not None and seen is not None and found[1] < seen[0]

    def __str__(self) -> str:
        parts = [f"{self.steps} steps audited"]
        for counted, of, told in (
            (self.missed, self.rows, "missed what dense was sure of"),
            (self.unrescued, self.rows, "of them after rescue"),
            (self.differ, self.decided, "decoded tokens that dense makes others"),
        ):
            between = "" if not of else " ({:.1%} to {:.1%})".format(*wilson(counted, of))
            parts.append(f"{counted} of {of} {told}{between}")
        return "; ".join(parts)

    def record(
        self,
        masked: Tensor,
        focus: Predictions,
        dense: Predictions,
        rescued: Tensor | None,
        threshold: float,
    ) -> None:
        """A step.

        Args:
            masked: bool ``[B, T]``, as fed; rescued: bool ``[B, T]``, or None.
            focus, dense: what either could decode; ``focus`` knows of retained tokens only.
            threshold: the confidence from which a token is sure.
        """
        able = focus.confidence >= 0
        first = able if rescued is None else able & ~rescued
        sure = masked & (dense.confidence >= threshold)
        judged = (masked & ~first).any(1) & sure.any(1)
        decided = decidable(masked & able, focus.confidence, threshold)
        self.steps += 1
        self.rows += int(judged.sum())
        self.missed += int((judged & ~(sure & first).any(1)).sum())
        self.unrescued += int((judged & ~(sure & able).any(1)).sum())
        self.decided += int(decided.sum())
        self.differ += int((decided & (focus.tokens != dense.tokens)).sum())


def decidable(candidates: Tensor, confidence: Tensor, threshold: float) -> Tensor:
    """Candidates that are sure; in a row without one, the surest."""
    ranked = torch.where(candidates, confidence, -1.0)
    sure = candidates & (ranked >= threshold)
    surest = torch.zeros_like(candidates).scatter_(1, ranked.argmax(1, keepdim=True), True)
    return torch.where(sure.any(1, keepdim=True), sure, surest & candidates)
