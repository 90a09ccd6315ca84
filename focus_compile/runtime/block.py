"""State of the current block of every row: docs/algorithm.md sections 0, 6 and 15.

A session keeps one per model. Everything is per row, so that rows may start, finish and be replaced
independently.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from focus_compile.errors import EvictedTokenDecoded
from focus_compile.ops.tables import last_position
from focus_compile.runtime.identity import NO_WEIGHTS, Weights

__all__ = ["BlockState", "History", "history_of", "right_of"]


@dataclass(frozen=True)
class History:
    """What tells one history from another.

    ``length``: keys before the block. ``mark``: the last of them in the last layer, ``[B, ...]``,
    or None without a cache or with an empty one. ``keys``: keys that the cache holds; ``places``:
    the slots that the block takes in a cache of fixed length, int64 ``[T]``, or ``[B, T]`` where
    rows have their own, else None; ``before``: the key that stands where the last one stood a call
    ago, or None. Of rows with slots of their own, ``length`` is the least.
    """

    length: int
    mark: Tensor | None
    keys: int = 0
    places: Tensor | None = None
    before: Tensor | None = None

    @property
    def starts(self) -> int | Tensor:
        """Where the block begins: ``length``, or int64 ``[B]``, row by row."""
        return _starts(self.length, self.places)

    def same_slots(self, other: History) -> bool:
        """Whether the block stands where it stood, among as many keys."""
        if (self.length, self.keys) != (other.length, other.keys):
            return False
        if self.places is None or other.places is None:
            return self.places is other.places
        return torch.equal(self.places, other.places)

    def same_rows(self, other: History) -> Tensor | bool:
        """bool ``[B]``, or False: which rows have the same history."""
        if not self.same_slots(other):
            return False
        if self.mark is None or other.mark is None:
            return self.mark is other.mark
        return _equal_rows(self.mark, other.mark)


def history_of(past: Tensor, dim: int, places: Tensor | None, before: History | None) -> History:
    """Of a call whose last layer has these keys, along ``dim``.

    ``places``: as :attr:`History.places`, which may be counted from the end; ``before``: the
    history of the call before.
    """
    keys = length = past.shape[dim]
    if places is not None:
        places = places.remainder(keys)
        length = int(places.min())
    mark = _key_before(past, dim, _starts(length, places))
    last = None if before is None else before.starts
    same = not isinstance(last, Tensor) or len(last) == len(past)
    if last is None or not same or (isinstance(last, int) and last > length):
        return History(length, mark, keys, places, None)
    return History(length, mark, keys, places, _key_before(past, dim, last))


def _starts(length: int, places: Tensor | None) -> int | Tensor:
    return length if places is None or places.dim() == 1 else places.amin(1)


def _key_before(past: Tensor, dim: int, starts: int | Tensor) -> Tensor | None:
    """The last key before a block, ``[B, ...]``; 0 in rows that begin with theirs."""
    if isinstance(starts, int):
        return past.select(dim, starts - 1).clone() if starts else None
    rows = torch.arange(len(past), device=past.device)
    keys = past.movedim(dim, 1)[rows, (starts - 1).clamp(0, past.shape[dim] - 1)]
    return keys.masked_fill((starts == 0).view(-1, *[1] * (keys.dim() - 1)), 0)


class BlockState:
    """Masks, averages and slots of one block per row; shapes ``[B, T]`` unless noted.

    Attributes:
        ids, masked: as fed to the last call. begun: bool, the masks of the block's first call.
        retained: bool, what the last call retained.
        final: bool, tokens that are no longer fed.
        written01, written: bool, slots that hold K/V in layers 0 and 1, and in later layers.
        progress: int64 ``[B]``; decoded_sum, decode_steps: int64 ``[B]``.
        calls: int64 ``[B]``, masked calls of the block so far; first_decoded: int64 ``[B]``, tokens
            decoded in the first step of the row's last block with masks, -1: not known.
        settled: bool ``[B]``, rows without masks that were fed whole once.
        slots: K/V of history and block by input name, as the last call returned them.
        goes_on: whether every row is in the block that it was in before the last call.
        confidence: fp32, the largest probability of each token when its logits were last computed,
            0: never; age: int64, calls since, -1: never; has_confidence: whether that is known.
        committed: whether a dense call ran since the last masked one.
        weights: tells the model that made the slots from what it is after a change.
        first: int64 ``[B]``, the leftmost masked token of the block's first call; begin: int64
            ``[B]``, the leftmost one that was decoded, T: none; reach: int64 ``[B]``, how far from
            the left tokens may be evicted (section 15); anywhere: bool scalar, whether a loop was
            seen that decodes a whole block at once.
    """

    def __init__(
        self,
        ids: Tensor,
        masked: Tensor,
        history: History,
        weights: Weights = NO_WEIGHTS,
    ) -> None:
        batch = masked.shape[0]
        none = torch.zeros_like(masked)
        count = torch.zeros(batch, dtype=torch.int64, device=masked.device)
        self.ids, self.masked, self.history = _copy(ids), _copy(masked), history
        self.begun = self.masked
        self.retained, self.final, self.written01, self.written = none, none, none, none
        self.settled = none[:, 0]
        self.calls, self.first_decoded = count, count - 1
        self.progress, self.decoded_sum, self.decode_steps = count - 1, count, count
        self.confidence, self.age = none.float(), none.long() - 1
        self.has_confidence = True
        self.first, self.reach = _leftmost(self.masked), count
        self.begin = count + masked.shape[1]
        self.anywhere = torch.zeros((), dtype=torch.bool, device=masked.device)
        self.slots: dict[str, Tensor] = {}
        self.goes_on = False
        self.committed = False
        self.weights = weights

    def fits(self, ids: Tensor, weights: Weights) -> bool:
        """Whether a call has the shape, dtype and device of this state, and its weights."""
        mine = (self.ids.shape, self.ids.dtype, self.ids.device)
        return (ids.shape, ids.dtype, ids.device) == mine and self.weights.same(weights)

    def observe(
        self,
        ids: Tensor,
        masked: Tensor,
        history: History,
        shifted_logits: bool = False,
        edited: Tensor | None = None,
        *,
        alone: bool = False,
        anew: Tensor | None = None,
    ) -> None:
        """Take in the next masked call: new blocks, and what was decoded since the last one.

        A mask-free call in between (a commit, or another request's prefill) ended every block.
        ``shifted_logits``: a position is decoded by the logits of its left neighbour. ``alone``: a
        row with masks of which nothing was decoded starts anew, and where nothing was in any row
        all do, so that the same call gives the same again. ``anew``, bool ``[B]``: rows that start
        anew whatever they hold. ``edited``, bool ``[B, T]``: decoded
        tokens that were changed, which start no other block; they are fed again, and their slots
        hold nothing until then.

        Raises:
            EvictedTokenDecoded: a position was decoded that the last call had evicted.
        """
        before = self.history
        decoded = self.masked & ~masked
        other = ids != self.ids
        edit = torch.zeros_like(masked)
        if edited is not None and edited.shape == masked.shape:
            edit = edited & other & ~self.masked & ~masked
        changed = (~self.masked & (masked | other) & ~edit).any(1)
        same = history.same_rows(self.history)
        fresh = torch.ones_like(changed) if self.committed or same is False else changed
        fresh = fresh if isinstance(same, bool) else fresh | ~same
        if alone:
            fresh = fresh | (masked.any(1) & ~decoded.any(1)) | ~decoded.any()
        if anew is not None:
            fresh = fresh | anew
        known = right_of(self.retained) if shifted_logits else self.retained
        wrong = decoded & ~known & ~fresh.unsqueeze(1)
        is_wrong, is_fresh = torch.stack([wrong.any(), fresh.any()]).tolist()  # the host waits once
        if is_wrong:
            row, position = wrong.nonzero()[0].tolist()
            raise EvictedTokenDecoded(row, position)
        count = decoded.sum(1)
        line = ~fresh.unsqueeze(1)
        self._note_first(decoded, masked, fresh, self._follows(ids, masked, history))
        self._note_reach(decoded & line, masked, fresh)
        self.decoded_sum = torch.where(fresh, 0, self.decoded_sum + count)
        self.decode_steps = torch.where(fresh, 0, self.decode_steps + (count > 0))
        self.progress = torch.where(fresh, -1, self.progress)
        self.final, self.retained = self.final & line & ~edit, self.retained & line
        # the slot of an edited token holds one that is gone
        self.written01, self.written = self.written01 & line, self.written & line & ~edit
        self.confidence = torch.where(line, self.confidence, 0.0)
        self.age = torch.where(line, self.age, -1)
        self.calls, self.settled = torch.where(fresh, 0, self.calls), self.settled & ~fresh
        if not history.same_slots(before):
            self.slots = {}
        self.begun = torch.where(line, self.begun, masked)
        self.ids, self.masked, self.history = _copy(ids), _copy(masked), history
        self.goes_on = not is_fresh
        self.committed = False

    def fed(self, delayed_cache: bool, skip_decoded_rows: bool = False) -> Tensor:
        """The processing list of this call, bool ``[B, T]`` (section 6).

        Rows with masks: all positions at first, then those that are not final. Rows without: all
        of them once, then none; none at all with ``skip_decoded_rows``.
        """
        some = self.masked.any(1, keepdim=True)
        if not delayed_cache:
            return (some | (not skip_decoded_rows)).expand_as(self.masked).contiguous()
        listed = torch.where(self.warm.unsqueeze(1), ~self.final, True)
        settled = self.settled.unsqueeze(1) | skip_decoded_rows
        return torch.where(some, listed, ~settled)

    @property
    def warm(self) -> Tensor:
        """bool ``[B]``: rows of which this block was called before."""
        return self.calls > 0

    def opens(self, budget: Tensor) -> Tensor:
        """Rows in whose first step nothing is evicted by ``first_step="auto"``, bool ``[B]``.

        Section 10. ``budget``: that of an average of 1, a scalar.
        """
        return (self.first_decoded < 0) | (self.first_decoded > budget)

    def computed(self, sure: Tensor | None) -> None:
        """Note confidences fp32 ``[B, T]`` of a call, -1 where none was computed; None: unknown."""
        self.has_confidence = sure is not None
        if sure is not None:
            new = sure >= 0
            self.confidence = torch.where(new, sure, self.confidence)
            self.age = torch.where(new, 0, torch.where(self.age < 0, -1, self.age + 1))

    def _follows(self, ids: Tensor, masked: Tensor, history: History) -> Tensor:
        """bool ``[B]``: rows whose next block this is, if it is another one.

        The history grew by the block, and what was its last key stands where it stood; or, without
        a history, the masks of the block have gone and nothing else has changed.
        """
        before = self.history
        if before.mark is None and history.mark is None:
            kept = (self.masked | (ids == self.ids)).all(1)
            return kept & ~(self.masked & masked).any(1)
        none = torch.zeros_like(self.settled)
        grew = none | (history.starts == before.starts + ids.shape[-1])
        if not self.committed:
            return none
        if before.mark is None:
            return grew
        return none if history.before is None else grew & _equal_rows(history.before, before.mark)

    def _note_first(self, decoded: Tensor, masked: Tensor, fresh: Tensor, follows: Tensor) -> None:
        """Section 10: how many tokens a block's first step decoded, once that is known."""
        ended = fresh & follows  # all that was left of it was decoded since
        count = torch.where(ended, self.masked.sum(1), decoded.sum(1))
        known = (self.calls == 1) & self.masked.any(1) & (~fresh | ended)
        self.first_decoded = torch.where(known, count, self.first_decoded)
        self.first_decoded = torch.where(fresh & ~follows, -1, self.first_decoded)

    def _note_reach(self, decoded: Tensor, masked: Tensor, fresh: Tensor) -> None:
        """Section 15: a loop that decodes far from the leftmost mask decodes anywhere."""
        length = masked.shape[1]
        last = last_position(decoded)
        self.begin = torch.where(fresh, length, torch.minimum(self.begin, _leftmost(decoded)))
        index = torch.arange(length, device=masked.device)
        leftmost = _leftmost(self.masked & (index >= self.begin.unsqueeze(1)))
        far = 2 * (last - leftmost) >= length - self.first
        self.anywhere = self.anywhere | (decoded.any(1) & far).any()
        reach = torch.where(fresh, 0, torch.maximum(self.reach, last + 1))
        self.reach = torch.where(self.anywhere, length, reach)
        self.first = torch.where(fresh, _leftmost(masked), self.first)

    def beyond(self, shifted_logits: bool) -> Tensor:
        """Masked tokens behind what the loop was seen to decode, bool ``[B, T]``.

        ``shifted_logits``: and the one before them, whose logits predict the first of them.
        """
        index = torch.arange(self.masked.shape[1], device=self.masked.device)
        return self.masked & (index + shifted_logits >= self.reach.unsqueeze(1))

    @property
    def average(self) -> Tensor:
        """Tokens decoded per decoding step of this block, fp32 ``[B]``; 1 before the first."""
        average = self.decoded_sum.float() / self.decode_steps.float()  # whatever the default dtype
        return torch.where(self.decode_steps > 0, average, 1.0)

    def advance(
        self, fed: Tensor, retained: Tensor, slots: dict[str, Tensor], delayed_cache: bool
    ) -> None:
        """Record what a call fed, retained and stored."""
        decoded = ~self.masked & (fed | self.final)
        right = torch.cat([decoded[:, 1:], torch.ones_like(decoded[:, :1])], dim=1)
        if delayed_cache:
            self.final = self.final | (fed & ~self.masked & right)
        self.settled = self.settled | ~self.masked.any(1)
        self.calls = self.calls + 1
        self.written01, self.written = self.written01 | fed, self.written | retained
        self.progress = torch.maximum(self.progress, last_position(retained))
        self.retained, self.slots = retained, slots


def _equal_rows(key: Tensor, other: Tensor) -> Tensor:
    """bool ``[B]``: which rows of two keys are the same."""
    if key.shape != other.shape or key.dtype != other.dtype:
        return torch.zeros(len(key), dtype=torch.bool, device=key.device)
    return (key == other).flatten(1).all(1)


def _leftmost(flags: Tensor) -> Tensor:
    """The first position of each row that is flagged, int64 ``[B]``; T: none is."""
    return (flags.cumsum(1) == 0).sum(1)


def right_of(flags: Tensor) -> Tensor:
    """Positions whose left neighbour is flagged, and the first. bool ``[B, T]``."""
    return torch.cat([torch.ones_like(flags[:, :1]), flags[:, :-1]], dim=1)


def _copy(value: Tensor) -> Tensor:
    """A contiguous copy: callers may write into what they passed."""
    return value.clone(memory_format=torch.contiguous_format)
