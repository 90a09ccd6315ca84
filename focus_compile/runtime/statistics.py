"""Counts over the calls of a session."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from focus_compile.runtime.audit import Audit

__all__ = ["SessionStats"]


@dataclass
class SessionStats:
    """Counts over the calls of a session.

    Attributes:
        steps: masked calls that ran prefix and suffix; dense_calls: calls that ran the dense
            program, mask-free ones above all.
        masked_dense: masked calls that computed every token: FOCUS was off, the graph was refused,
            or Dynamo ran the model eagerly. As far as they are known: a session around a loop of
            your own sees no call that never reaches the backend.
        canvas: tokens of the blocks as the caller sees them, summed over steps; fed: tokens that
            layers 0 and 1 computed; retained: tokens that later layers computed.
            rescued tokens included; rescued: those of them that a second pass computed, because
            the first had retained none that was sure; rescued_rows: rows and steps in which that
            was so.
        fed_per_step, retained_per_step, rescued_per_step: the same, one entry per step.
        audit: of the steps that were computed densely as well, with ``session(audit=...)``.
    """

    steps: int = 0
    dense_calls: int = 0
    masked_dense: int = 0
    canvas: int = 0
    fed_per_step: list[int] = field(default_factory=list)
    retained_per_step: list[int] = field(default_factory=list)
    rescued_per_step: list[int] = field(default_factory=list)
    rescued_rows: int = 0
    audit: Audit | None = None

    @property
    def fed(self) -> int:
        return sum(self.fed_per_step)

    @property
    def retained(self) -> int:
        return sum(self.retained_per_step)

    @property
    def rescued(self) -> int:
        return sum(self.rescued_per_step)

    @property
    def fed_fraction(self) -> float:
        """Fed tokens over canvas tokens; 0 before the first step."""
        return self.fed / self.canvas if self.canvas else 0.0

    @property
    def retained_fraction(self) -> float:
        """Retained tokens over canvas tokens; 0 before the first step."""
        return self.retained / self.canvas if self.canvas else 0.0

    def record(self, canvas: int, fed: int, retained: int, rescued: Tensor | None) -> None:
        """A step; ``rescued``: bool ``[B, T]``, or None."""
        self.steps += 1
        self.canvas += canvas
        self.fed_per_step.append(fed)
        self.retained_per_step.append(retained)
        self.rescued_per_step.append(0 if rescued is None else int(rescued.sum()))
        self.rescued_rows += 0 if rescued is None else int(rescued.any(1).sum())
