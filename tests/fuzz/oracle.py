"""What a session owes its caller: docs/algorithm.md by the eager emulation, row by row.

When a row starts anew is told in words by docs/algorithm.md and docs/sessions.md: a decoded
position is masked again, an id changed, the history is another one, a mask-free call came in
between, or, in no session, nothing of it was decoded.
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


@dataclass
class Oracle:
    """One session's block state of one model.

    Attributes:
        shifted: whether the token at p is decoded by the logits of p - 1.
        commits: whether the caller promised to commit, so that decoded rows need not be fed.
        alone: whether a row of which nothing was decoded starts anew, as in no session.
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
    last: Seen | None = None
    ended: bool = False
    emulation: Emulation = field(default_factory=Emulation)

    def forget(self) -> None:
        self.last, self.ended = None, False

    def expected_error(self, draw: RowDraw) -> type[Exception] | None:
        """What a masked call must be refused with."""
        last = self._comparable(draw)
        if last is None:
            return None
        known = last.retained
        if self.shifted:
            known = torch.cat([torch.ones_like(known[:, :1]), known[:, :-1]], 1)
        wrong = last.masked & ~draw.masked & ~known
        found = any(
            bool(wrong[row].any()) and not self._starts_anew(row, draw, last)
            for row in range(len(wrong))
        )
        return EvictedTokenDecoded if found else None

    def step(self, logits: Callable[[], Tensor], draw: RowDraw) -> Emulated:
        """A masked call that must be served."""
        last = self._comparable(draw)
        if last is None:
            self.emulation = Emulation()
        self.emulation.config = self.config
        self.emulation.judge = Judge(MASK, shifted=self.shifted)
        fresh = [last is None or self._starts_anew(b, draw, last) for b in range(len(draw.ids))]
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
        found = self.emulation.step(logits, draw.ids, draw.masked, draw.history)
        self.last = Seen(draw.ids, draw.masked, draw.rows, draw.history, found.retained)
        self.ended = False
        return found

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
            decoded = (last.masked & ~draw.masked).any(1)
            if not decoded.any() or (draw.masked[row].any() and not decoded[row]):
                return True
        again = settled & draw.masked[row]
        other = settled & (draw.ids[row] != last.ids[row])
        return bool(again.any()) or bool(other.any())


def _leftmost(masked: Tensor) -> int:
    places = masked.nonzero().flatten().tolist()
    return min(places, default=len(masked))
