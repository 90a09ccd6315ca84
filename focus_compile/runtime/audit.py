"""A step now and then, computed densely beside: what did eviction miss, and what came out else?

docs/algorithm.md section 14. It measures and changes nothing; rescue protects.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from focus_compile.intervals import wilson
from focus_compile.programs.halves import Returned
from focus_compile.programs.layout import Layout

__all__ = ["Audit", "Look", "dense_rows", "look_at"]


@dataclass
class Audit:
    """Counts over the steps that were computed densely as well.

    Attributes:
        every: one step in so many is one of them.
        steps: how many there were.
        rows: rows of them in which a masked token was evicted and dense was sure of one; missed:
            those of these in which none of dense's sure tokens was retained at first; unrescued:
            and none after rescue.
        decided: tokens that FOCUS could decode in these steps, in all rows: the sure ones, else the
            surest of a row; differ: those of which dense makes another token.
    """

    every: int
    steps: int = 0
    rows: int = 0
    missed: int = 0
    unrescued: int = 0
    decided: int = 0
    differ: int = 0

    def due(self, step: int) -> bool:
        """Whether a step is one of them; the first one has the number 1."""
        return step % self.every == 0

    @property
    def hit_range(self) -> tuple[float, float] | None:
        """The 95 % interval of the share of rows in which a sure token was retained at first."""
        return wilson(self.rows - self.missed, self.rows) if self.rows else None

    @property
    def differ_range(self) -> tuple[float, float] | None:
        """The 95 % interval of the share of decided tokens of which dense makes another."""
        return wilson(self.differ, self.decided) if self.decided else None

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
        self, masked: Tensor, focus: Look, dense: Look, rescued: Tensor | None, threshold: float
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


@dataclass(frozen=True)
class Look:
    """The token that each position could be decoded to, int64 ``[B, T]``, and its confidence, fp32.

    A confidence of -1: its logits were not computed.
    """

    confidence: Tensor
    tokens: Tensor = field(repr=False)


def look_at(
    shape: torch.Size,
    where: Tensor,
    found: tuple[Tensor, Tensor],
    before: tuple[Tensor, Tensor] | None,
    *,
    shifted: bool,
) -> Look:
    """Confidences and tokens of some rows of logits, on the canvas.

    Args:
        where: int64 ``[N]``, flat positions of the rows; found: their confidences and tokens.
        before: those of the token in front of the block, ``[B]`` each; None: it has no logits.
        shifted: the token at p is predicted by the row of p - 1.
    """
    confidence = torch.full(shape, -1.0, device=where.device)
    tokens = torch.zeros(shape, dtype=torch.int64, device=where.device)
    confidence.view(-1)[where], tokens.view(-1)[where] = found
    if not shifted:
        return Look(confidence, tokens)
    if before is None:
        before = torch.full_like(confidence[:, 0], -1.0), torch.zeros_like(tokens[:, 0])
    return Look(
        torch.cat([before[0].unsqueeze(1), confidence[:, :-1]], 1),
        torch.cat([before[1].unsqueeze(1), tokens[:, :-1]], 1),
    )


def dense_rows(
    dense: Callable[..., Any], layout: Layout, args: Sequence[Any], at: int, logits: Returned
) -> Tensor | None:
    """The dense program's logits of a call, ``[B * T, V]``; the call leaves no trace.

    ``at``: which of its outputs they are; ``logits``: what is known of them. None: they are not
    those of every token.
    """
    if logits.batch_dim is None or logits.last is not None:
        return None
    written = {*layout.written, *(held.argument for held in layout.held)}
    copies = [arg.clone() if index in written else arg for index, arg in enumerate(args)]
    canvas: Tensor = dense(*copies)[at]
    return canvas.movedim((logits.batch_dim, logits.token_dim), (0, 1)).flatten(0, 1).flatten(1)


def decidable(candidates: Tensor, confidence: Tensor, threshold: float) -> Tensor:
    """Candidates that are sure; in a row without one, the surest."""
    ranked = torch.where(candidates, confidence, -1.0)
    sure = candidates & (ranked >= threshold)
    surest = torch.zeros_like(candidates).scatter_(1, ranked.argmax(1, keepdim=True), True)
    return torch.where(sure.any(1, keepdim=True), sure, surest & candidates)
