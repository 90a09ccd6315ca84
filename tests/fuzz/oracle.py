"""What a session owes its caller: docs/algorithm.md by the eager emulation, row by row.

When a row starts anew is told in words by docs/algorithm.md and docs/sessions.md: a decoded
position is masked again, an id changed, the history is another one, a mask-free call came in
between, or, in no session, nothing of it was decoded, or its loop made several calls in the step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from focus_compile import EvictedTokenDecoded
from tests.fuzz.subjects import RowDraw
from tests.reference.emulation import Emulated, Emulation
from tests.reference.state import Config, RowState
from tests.reference.trust import Judge
from tests.support.harness import MASK

TOLERANCE = 1e-4


def quick_importance(
    query_MHD: Tensor, key_MGD: Tensor, scale: float, dtype: torch.dtype = torch.float32
) -> Tensor:
    """``algorithm.importance`` without its loops; a test holds the two together."""
    if not len(query_MHD):
        return torch.zeros(0, dtype=dtype)
    share = query_MHD.shape[1] // key_MGD.shape[1]
    query, key = query_MHD.to(dtype), key_MGD.to(dtype).repeat_interleave(share, 1)
    scores = torch.einsum("ihd,jhd->hij", query, key) * scale
    pooled = F.pad(scores, (1, 1), value=-torch.inf).unfold(-1, 3, 1).amax(-1)
    return torch.softmax(pooled, -1).sum((0, 1))


@dataclass(frozen=True)
class Seen:
    """The last masked call."""

    ids: Tensor
    masked: Tensor
    rows: tuple[int, ...]
    history: int
    retained: Tensor
    again: tuple[bool, ...] = ()
    """In no session: rows whose step had a call before this one."""


@dataclass
class Oracle:
    """One session's block state of one model.

    Attributes:
        shifted: whether the token at p is decoded by the logits of p - 1.
        commits: whether the caller promised to commit, so that decoded rows need not be fed.
        alone: whether section 15 holds, as in no session.
        looks: whether it sees where a loop decodes (section 15), by what follows.
        last: the last masked call, or None; ended: whether a dense call ran since.
    """

    config: Config
    shifted: bool = False
    commits: bool = False
    alone: bool = False
    looks: bool = False
    reach: list[int] = field(default_factory=list)
    first: list[int] = field(default_factory=list)
    begin: list[int] = field(default_factory=list)
    anywhere: bool = False
    begun: list[Tensor] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)
    """The last masked calls, the latest first, in no session."""
    last: Seen | None = None
    ended: bool = False
    emulation: Emulation = field(default_factory=Emulation)

    def forget(self) -> None:
        self.last, self.ended, self.seen = None, False, []

    def expected_error(self, draw: RowDraw) -> type[Exception] | None:
        """What a masked call must be refused with."""
        if self.alone:
            sources = [self._source(row, draw) for row in range(len(draw.ids))]
            lost = any(
                seen is not None and bool(self._wrong(seen, draw)[row].any())
                for row, (_, seen) in enumerate(sources)
            )
            return EvictedTokenDecoded if lost else None
        last = self._comparable(draw)
        if last is None:
            return None
        wrong = self._wrong(last, draw)
        found = any(
            bool(wrong[row].any()) and not self._starts_anew(row, draw, last)
            for row in range(len(wrong))
        )
        return EvictedTokenDecoded if found else None

    def _wrong(self, last: Seen, draw: RowDraw) -> Tensor:
        """Tokens that were decoded since a call, though it had evicted what predicts them."""
        known = last.retained
        if self.shifted:
            known = torch.cat([torch.ones_like(known[:, :1]), known[:, :-1]], 1)
        return last.masked & ~draw.masked & ~known

    def _source(self, row: int, draw: RowDraw) -> tuple[int, Seen | None]:
        """Section 15.3: which of the last calls a row goes on from, and its number among them."""
        nearest: tuple[int, int, Seen | None] = (len(draw.ids[row]) + 1, 0, None)
        for index, seen in enumerate(self.seen):
            if seen.ids.shape != draw.ids.shape or draw.history != seen.history:
                continue
            if draw.history and draw.rows[row] != seen.rows[row]:
                continue
            open_ = seen.masked[row]
            if bool((~open_ & (draw.masked[row] | (draw.ids[row] != seen.ids[row]))).any()):
                continue
            decoded = int((open_ & ~draw.masked[row]).sum())
            if decoded < nearest[0]:
                nearest = (decoded, index, seen)
        return nearest[1:]

    def _again(self, draw: RowDraw) -> tuple[bool, ...]:
        """Rows whose step had a call before this one."""
        found = [self._source(row, draw) for row in range(len(draw.ids))]
        moved = [
            seen is not None and bool((seen.masked[row] & ~draw.masked[row]).any())
            for row, (_, seen) in enumerate(found)
        ]
        return tuple(seen is not None and (index > 0 or not any(moved)) for index, seen in found)

    def step(self, logits: Callable[[], Tensor], draw: RowDraw) -> Emulated:
        """A masked call that must be served."""
        last = self._comparable(draw)
        if last is None:
            self.emulation = Emulation()
        self.emulation.config = self.config
        self.emulation.judge = Judge(MASK, shifted=self.shifted)
        fresh = [last is None or self._starts_anew(b, draw, last) for b in range(len(draw.ids))]
        again = self._again(draw)
        for b, row in enumerate(self.emulation.rows):
            assert last is not None
            if fresh[b]:
                none = [False] * draw.ids.shape[1]
                self.emulation.rows[b] = RowState([], [*none], [*none], [*none])
                continue
            row.record(int((last.masked[b] & ~draw.masked[b]).sum()))
            if not self.config.stale_kv:
                for flags in (row.written01, row.written):
                    flags[:] = [a and b for a, b in zip(flags, row.final, strict=True)]
        if self.commits:
            self._settle(draw)
        if self.looks:
            self._look(draw, last, fresh)
        if self.alone:
            self._join(draw, fresh)
        found = self.emulation.step(logits, draw.ids, draw.masked, draw.history)
        self.last = Seen(draw.ids, draw.masked, draw.rows, draw.history, found.retained, again)
        self.seen = [self.last, *self.seen[:3]]
        self.ended = False
        return found

    def _join(self, draw: RowDraw, fresh: list[bool]) -> None:
        """Section 15.4: rows that decoded the same at the same places since their blocks began."""
        rows = range(len(draw.ids))
        if len(self.begun) != len(rows) or self.begun[0].shape != draw.masked[0].shape:
            fresh = [True for _ in rows]
            self.begun = [draw.masked[b] for b in rows]
        self.begun = [draw.masked[b] if fresh[b] else self.begun[b] for b in rows]
        made = [torch.where(self.begun[b] & ~draw.masked[b], draw.ids[b], -1) for b in rows]
        self.emulation.shifted = self.shifted
        self.emulation.partners = [
            {c for c in rows if bool((made[b] >= 0).any()) and torch.equal(made[b], made[c])}
            for b in rows
        ]

    def _look(self, draw: RowDraw, last: Seen | None, fresh: list[bool]) -> None:
        """Section 15.2: who must not be evicted, for nobody knows yet where the loop decodes."""
        rows, tokens = draw.ids.shape
        if last is None:
            none = [False] * tokens
            self.emulation.rows = [RowState([], [*none], [*none], [*none]) for _ in range(rows)]
            self.reach, self.first, self.anywhere = [0] * rows, [0] * rows, False
            self.begin = [tokens] * rows
        for b in range(rows):
            if fresh[b]:
                self.reach[b], self.first[b] = 0, _leftmost(draw.masked[b])
                self.begin[b] = tokens
                continue
            assert last is not None
            decoded = (last.masked[b] & ~draw.masked[b]).nonzero().flatten().tolist()
            if decoded:
                self.begin[b] = min(self.begin[b], *decoded)
                left = min(p for p in range(self.begin[b], tokens) if last.masked[b, p])
                self.anywhere |= 2 * (max(decoded) - left) >= tokens - self.first[b]
                self.reach[b] = max(self.reach[b], 1 + max(decoded))
        for b, row in enumerate(self.emulation.rows):
            end = tokens if self.anywhere else self.reach[b]
            open_ = draw.masked[b].nonzero().flatten().tolist()
            row.required = frozenset(p for p in open_ if p + self.shifted >= end)

    def _settle(self, draw: RowDraw) -> None:
        """Rows without masks count as fed already."""
        if not self.emulation.rows:
            none = [False] * draw.ids.shape[1]
            self.emulation.rows = [RowState([], [*none], [*none], [*none]) for _ in draw.ids]
        for row, ids, masked in zip(self.emulation.rows, draw.ids, draw.masked, strict=True):
            row.settled = row.settled if masked.any() else ids.tolist()

    def _comparable(self, draw: RowDraw) -> Seen | None:
        """The last masked call, if this one has its shape."""
        return self.last if self.last and self.last.ids.shape == draw.ids.shape else None

    def _starts_anew(self, row: int, draw: RowDraw, last: Seen) -> bool:
        if self.ended or draw.history != last.history:
            return True
        if draw.history and draw.rows[row] != last.rows[row]:
            return True
        settled = ~last.masked[row]
        if self.alone:
            index, seen = self._source(row, draw)
            if seen is not None and (index > 0 or seen.again[row]):
                return True
            decoded = (last.masked & ~draw.masked).any(1)
            if not decoded.any() or (draw.masked[row].any() and not decoded[row]):
                return True
        again = settled & draw.masked[row]
        other = settled & (draw.ids[row] != last.ids[row])
        return bool(again.any()) or bool(other.any())


def _leftmost(masked: Tensor) -> int:
    places = masked.nonzero().flatten().tolist()
    return min(places, default=len(masked))
