"""Calls of loops that say nothing, by the call that each goes on from (docs/algorithm.md, 15).

A loop may make several calls in a step: with a prompt and without it, as guidance does, or of
several requests in turn. What was decoded since a call was decoded by its logits, and perhaps by
those of others, so that a token which any of them evicted may be lost. So in such a loop nothing
is evicted, and a token that was decoded is looked up in the call that it was decoded from.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from focus_compile.errors import EvictedTokenDecoded
from focus_compile.runtime.block import BlockState, History, right_of

__all__ = ["Turns", "kept_together"]

REMEMBERED = 4


@dataclass(frozen=True)
class _Seen:
    """A masked call: ``ids``, ``masked``, ``retained`` ``[B, T]`` and the history, as in
    :class:`BlockState`; ``again``: bool ``[B]``, rows whose step had a call before it."""

    ids: Tensor
    masked: Tensor
    history: History
    retained: Tensor
    again: Tensor

    def fits(self, ids: Tensor) -> bool:
        mine = (self.ids.shape, self.ids.dtype, self.ids.device)
        return (ids.shape, ids.dtype, ids.device) == mine


class Turns:
    """The last masked calls of one model, the latest first."""

    def __init__(self) -> None:
        self._seen: list[_Seen] = []
        self._again: Tensor | None = None

    def take(self, ids: Tensor, masked: Tensor, history: History, shifted_logits: bool) -> Tensor:
        """Rows of the next call that start anew for other calls came in between, bool ``[B]``.

        A row goes on from the call since which the fewest of its tokens were decoded, of several
        from the latest. ``ids, masked``: ``[B, T]``; ``shifted_logits``: as for
        :meth:`BlockState.observe`.

        Raises:
            EvictedTokenDecoded: that call had evicted one of them.
        """
        rows, length = masked.shape
        fewest = torch.full((rows,), length + 1, device=masked.device)
        wrong, no_row = torch.zeros_like(masked), torch.zeros_like(masked[:, 0])
        older, again = no_row, no_row
        for index, seen in enumerate(self._seen):
            if not seen.fits(ids):
                continue
            same = history.same_rows(seen.history)
            changed = (seen.masked < masked) | (~seen.masked & (ids != seen.ids))
            decoded = seen.masked & ~masked
            count = decoded.sum(1)
            nearer = ~changed.any(1) & (count < fewest) & same
            known = right_of(seen.retained) if shifted_logits else seen.retained
            wrong = torch.where(nearer.unsqueeze(1), decoded & ~known, wrong)
            older = torch.where(nearer, index > 0, older)
            again = torch.where(nearer, seen.again, again)
            fewest = torch.where(nearer, count, fewest)
        if bool(wrong.any()):
            self._seen = []
            row, position = wrong.nonzero()[0].tolist()
            raise EvictedTokenDecoded(row, position)
        went_on = (fewest > 0) & (fewest <= length)
        repeated = (fewest == 0) & ~went_on.any()
        self._again = older | repeated
        return older | again

    def note(self, state: BlockState) -> None:
        """The call that was taken last is through, and this is its state."""
        again = torch.zeros_like(state.masked[:, 0]) if self._again is None else self._again
        seen = _Seen(state.ids, state.masked, state.history, state.retained, again)
        self._seen = [seen, *self._seen[: REMEMBERED - 1]]


def kept_together(state: BlockState, kept: Tensor, shifted_logits: bool) -> Tensor | None:
    """Evicted tokens that were kept in rows which are decoded together; None where there is none.

    Such rows are a prompt and the same without it, say, in one batch: since their block began they
    decoded the same tokens at the same places. ``kept``, and what is returned: bool ``[B, T]``.
    ``shifted_logits``: a masked token needs the logits of the one before it.
    """
    decoded = torch.where(state.begun & ~state.masked, state.ids, -1)
    alike = (decoded.unsqueeze(1) == decoded).all(2) & (decoded >= 0).any(1)
    open_ = state.masked
    if shifted_logits:
        open_ = open_ | F.pad(open_[:, 1:], (0, 1))
    shared = alike.float() @ (kept & open_).float() > 0
    missing = shared & state.masked & ~kept
    return missing if bool(missing.any()) else None
