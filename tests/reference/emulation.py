"""FOCUS on any eager model, by what its attention is given: docs/algorithm.md on whole blocks.

Everything but attention treats tokens one by one, so what evicted tokens compute does not matter as
long as nobody reads it. The model runs on the whole block, unchanged; its attention calls are
replaced by ones in which keys and values of tokens that would not have been computed are those of
earlier steps, or hidden. The logits of retained tokens are then those of FOCUS.

For a rescue the model runs once more: kept tokens attend as before, evicted ones of the rows in
need to what both passes wrote.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from tests.reference import algorithm, trust
from tests.reference.state import Config, RowState
from tests.reference.trust import Judge, Need
from tests.support.models import parts


@dataclass
class Emulated:
    """One step: ``logits`` as the model gives them; ``fed``, ``retained`` bool ``[B, T]``."""

    logits: Tensor
    fed: Tensor
    retained: Tensor
    margin: float
    """The least of the rows': how near the deltas are to another selection."""
    rescued: Tensor
    """Bool ``[B, T]``: part of ``retained``."""
    need_margin: float
    """The least of the rows': how near c* is to tau."""


@dataclass
class Emulation:
    """States of the rows of a batch over the steps of one block."""

    config: Config = field(default_factory=Config)
    judge: Judge | None = None
    """What section 11 must know of decoding; needed for rescue and the signal "confidence"."""
    session: bool = True
    """False: section 10's call without one, always ``first_step="evict"``."""
    rows: list[RowState] = field(default_factory=list)
    partners: list[set[int]] = field(default_factory=list)
    """Section 15: of each row those that are decoded with it; none where it is empty."""
    shifted: bool = False
    """Whether a partner's masked token needs the logits of the one before it."""
    slots: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @torch.no_grad()
    def step(
        self,
        call: Callable[[], Tensor],
        ids: Tensor,
        masked: Tensor,
        history: int,
        before: Tensor | None = None,
    ) -> Emulated:
        """Run a model; ``call`` returns its logits ``[B, T, V]``; ``history``: keys before them.

        With rescue ``call`` may run twice, and must do the same both times. ``before``: logits
        ``[B, V]`` of the row before the block, if they are shifted.
        """
        batch, tokens = masked.shape
        if not self.rows:
            none = [False] * tokens
            self.rows = [RowState([], [*none], [*none], [*none]) for _ in range(batch)]
        flags = [[bool(flag) for flag in row] for row in masked]
        fed = [
            row.processing_list(row_ids.tolist(), row_flags, self.config.delayed_cache)
            for row, row_ids, row_flags in zip(self.rows, ids, flags, strict=True)
        ]
        one = _Step(self, flags, fed, history)
        logits = one.run(call)
        needs = [self._need(one, logits, b, before) for b in range(batch)]
        rescued = [need.evicted if need.flag else [] for need in needs]
        if self.partners:
            rescued = self._with_partners(flags, one.kept, rescued)
        if any(rescued):
            one.rescued = rescued
            logits = torch.where(_flags(rescued, tokens)[..., None], one.run(call), logits)
        retained = [sorted(kept + more) for kept, more in zip(one.kept, rescued, strict=True)]
        for b, row in enumerate(self.rows):
            if not fed[b]:
                continue
            row.mark(row.written01, fed[b])
            row.mark(row.written, retained[b])
            row.progress, row.warm = max([one.progress[b], *rescued[b]]), True
            row.had_masks = row.had_masks or any(flags[b])
            if self.judge is not None:
                confidence = {p: self._sureness(logits[b, p]) for p in retained[b]}
                row.memory = trust.remember(
                    row.memory, row.steps, confidence, tokens, self.judge.shifted
                )
            row.steps += 1
            row.settled = None if any(flags[b]) else ids[b].tolist()
            if self.config.delayed_cache:
                row.final = algorithm.finalise(flags[b], fed[b], row.final)
        return Emulated(
            logits,
            _flags(fed, tokens),
            _flags(retained, tokens),
            one.margin,
            _flags(rescued, tokens),
            min(need.margin for need in needs),
        )

    def _with_partners(
        self, flags: list[list[bool]], kept: list[list[int]], rescued: list[list[int]]
    ) -> list[list[int]]:
        """Section 15.4: masked tokens that a partner has computed are rescued, too."""
        computed = [{*some, *more} for some, more in zip(kept, rescued, strict=True)]
        made = []
        for b, others in enumerate(self.partners):
            shared = {
                p
                for c in {*others, b}
                for p in computed[c]
                if flags[c][p] or (self.shifted and any(flags[c][p + 1 : p + 2]))
            }
            wanted = {p for p in shared if flags[b][p]} | {*rescued[b]}
            made.append(sorted(wanted - {*kept[b]}))
        return made

    def _need(self, one: _Step, logits: Tensor, b: int, before: Tensor | None) -> Need:
        if self.config.rescue is None:
            return Need([], math.nan, False, math.inf)
        assert self.judge is not None
        return trust.need(
            [p for p in one.fed[b] if one.flags[b][p]],
            one.kept[b],
            {p: self._sureness(logits[b, p]) for p in one.kept[b]},
            self.config.rescue,
            self.judge,
            None if before is None else self._sureness(before[b]),
        )

    def _sureness(self, logits_V: Tensor) -> float:
        assert self.judge is not None
        return trust.sureness(logits_V, self.judge.mask_id)


class _Step(TorchFunctionMode):
    def __init__(
        self,
        emulation: Emulation,
        flags: Sequence[Sequence[bool]],
        fed: Sequence[list[int]],
        history: int,
    ) -> None:
        super().__init__()
        self.history = history
        self.emulation, self.flags, self.fed = emulation, flags, fed
        self.layer = 0
        self.first: list[Tensor] = []
        self.kept: list[list[int]] = []
        self.progress: list[int] = []
        self.margin = float("inf")
        self.rescued: list[list[int]] | None = None
        """Not None: the second pass."""

    def run(self, call: Callable[[], Tensor]) -> Tensor:
        self.layer = 0
        with self, mock.patch.object(parts, "softmax_attention", self.softmax_attention):
            return call()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return self.sdpa(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def softmax_attention(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor:
        return self.sdpa(query, key, value, mask, scale=scale)

    def sdpa(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        assert not dropout_p
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        times = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
        tokens, keys = query.shape[2], key.shape[2]
        block = slice(self.history, self.history + tokens)
        layer, self.layer = self.layer, self.layer + 1
        if layer < 2 and self.rescued is None:
            self._score(query, key[:, :, block], scale, layer)
        bias = torch.zeros(query.shape[0], 1, tokens, keys)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            bias = bias.masked_fill(~attn_mask, float("-inf"))
        elif attn_mask is not None:
            bias = bias + attn_mask
        if is_causal:
            bias = bias.masked_fill(~torch.ones(tokens, keys).tril().bool(), float("-inf"))

        def attend(stored: Sequence[list[int]], bounds: Sequence[list[int]]) -> Tensor:
            merged_key, merged_value, written = self._merge(layer, stored, key, value, block)
            seen = bias.clone()
            for b, row in enumerate(written):
                last = max(bounds[b], default=-1)
                bound = last if self.emulation.config.visibility == "prefix" else None
                hidden = torch.zeros(keys, dtype=torch.bool)
                hidden[block] = ~torch.tensor(trust.visible_slots(row, bound))
                seen[b] = seen[b].masked_fill(hidden, float("-inf"))
            scores = query.float() @ merged_key.float().transpose(2, 3) * scale + seen
            weights = torch.softmax(scores, -1).nan_to_num()
            return (weights @ merged_value.float()).to(query.dtype)

        # This order: the second pass writes what the first one must not see.
        first = attend(self.fed if layer < 2 else self.kept, self.kept if layer else self.fed)
        if self.rescued is None or layer == 0:
            return first
        union = [kept + more for kept, more in zip(self.kept, self.rescued, strict=True)]
        second = attend(self.fed if layer < 2 else union, self.fed)
        return torch.where(_flags(self.rescued, tokens)[:, None, :, None], second, first)

    def _score(self, query: Tensor, key: Tensor, scale: float, layer: int) -> None:
        for b, row in enumerate(self.emulation.rows):
            masked = [p for p in self.fed[b] if self.flags[b][p]]
            found = algorithm.importance(
                query[b][:, masked].transpose(0, 1),
                key[b][:, masked].transpose(0, 1),
                scale,
                algorithm.compute_dtype(query.dtype),
            )
            if layer == 0:
                self.first.append(found)
                continue
            if not self.fed[b]:
                self.kept.append([])
                self.progress.append(row.progress)
                continue
            _, made = row.decide(
                self.emulation.config,
                self.fed[b],
                self.flags[b],
                (self.first[b], found),
                session=self.emulation.session,
            )
            self.kept.append(made.kept)
            self.progress.append(made.progress)
            self.margin = min(self.margin, made.margin)

    def _merge(
        self, layer: int, stored: Sequence[list[int]], key: Tensor, value: Tensor, block: slice
    ) -> tuple[Tensor, Tensor, list[list[bool]]]:
        """Keys and values with those of other tokens as they were, and which slots hold any."""
        slots = self.emulation.slots
        if layer not in slots:
            empty = torch.zeros_like(key[:, :, block])
            slots[layer] = (empty, torch.zeros_like(value[:, :, block]))
        written = []
        for b, row in enumerate(self.emulation.rows):
            for slot, new in zip(slots[layer], (key, value), strict=True):
                slot[b][:, stored[b]] = new[b][:, block][:, stored[b]]
            before = row.written01 if layer < 2 else row.written
            written.append([p in stored[b] or flag for p, flag in enumerate(before)])
        key, value = key.clone(), value.clone()
        key[:, :, block], value[:, :, block] = slots[layer]
        return key, value, written


def _flags(lists: Sequence[Sequence[int]], tokens: int) -> Tensor:
    return torch.tensor([[p in kept for p in range(tokens)] for kept in lists])
