"""What one row remembers within a block (docs/algorithm.md, section 0), and what a step reports."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from torch import Tensor
from transformers import Qwen3ForCausalLM

from tests.reference import algorithm, qwen3, trust
from tests.reference.qwen3 import History

Visibility = Literal["written", "prefix"]


@dataclass(frozen=True)
class Config:
    """Sections 2, 5, 6 and 10 to 12: what a step may be told to do differently."""

    alpha: float = 1.5
    visibility: Visibility = "written"
    delayed_cache: bool = True
    stale_kv: bool = True
    """Without: of earlier steps of the block, only the K/V of final tokens is visible."""
    rescue: float | None = None
    first_step: trust.FirstStep = "evict"
    signal: trust.Signal = "delta"

    def __post_init__(self) -> None:
        if self.rescue is not None and not 0 <= self.rescue <= 1:
            raise ValueError(f"rescue is a threshold in [0, 1], not {self.rescue}")


@dataclass
class RowState:
    """Section 0, plus the block's K/V; reset when the block is committed."""

    slots: History
    """Per layer: key [G, T, D] and value [G, T, D] of the block; zeros until written."""
    written01: list[bool]
    written: list[bool]
    final: list[bool]
    warm: bool = False
    progress: int = -1
    decoded_sum: int = 0
    decode_steps: int = 0
    settled: list[int] | None = None
    """The ids of the last step if it had no masks, hence was fed whole."""
    opens: bool = True
    """Section 10; outlives the block, see `opens_next`."""
    had_masks: bool = False
    first_decoded: int = 0
    """n1 of section 10."""
    steps: int = 0
    memory: trust.Memory = field(default_factory=dict)
    """Section 12: the confidences of this block."""
    required: frozenset[int] = frozenset()
    """Section 15: positions of the next step that must not be evicted."""
    least: int = 1
    """Section 15: tokens_per_step."""

    @classmethod
    def fresh(cls, model: Qwen3ForCausalLM, tokens: int, opens: bool = True) -> RowState:
        slots = []
        for key, _ in qwen3.no_history(model):
            groups, _, head_dim = key.shape
            slots.append(
                (key.new_zeros(groups, tokens, head_dim), key.new_zeros(groups, tokens, head_dim))
            )
        return cls(slots, [False] * tokens, [False] * tokens, [False] * tokens, opens=opens)

    @property
    def avg(self) -> float:
        return algorithm.average(self.decoded_sum, self.decode_steps)

    def record(self, decoded: int) -> None:
        """Section 2: to be called after each decode step."""
        if self.steps == 1:
            self.first_decoded = decoded
        if decoded > 0:
            self.decoded_sum += decoded
            self.decode_steps += 1

    def opens_next(self, alpha: float) -> bool:
        """Section 10: `opens` of the next block, to be asked when this one is committed."""
        return trust.opens_next(self.opens, self.had_masks, self.first_decoded, alpha)

    def decide(
        self,
        config: Config,
        fed: Sequence[int],
        masked: Sequence[bool],
        importances: tuple[Tensor, Tensor],
        *,
        score: Tensor | None = None,
        bias: Tensor | None = None,
        session: bool = True,
    ) -> tuple[Tensor, algorithm.Eviction]:
        """Sections 2-4, 10 and 12: the scores [m], and what they decide.

        score: instead of config.signal's. bias: [T], added to those of config.signal.
        """
        positions = [p for p in fed if masked[p]]
        flags = [masked[p] for p in fed]
        choose = algorithm.select
        if score is None:
            added = None if bias is None else bias[positions]
            score = trust.score(config.signal, positions, *importances, self.memory, added)
            choose = partial(
                trust.select,
                config.signal,
                last=trust.last_computed(self.memory, positions),
                biased=bias is not None,
            )
        eviction = algorithm.evict(fed, flags, score, self.avg, config.alpha, self.progress, choose)
        if self.least > 1 or self.required & {*positions}:
            eviction = trust.evict_named(
                fed, flags, score, self.avg, config.alpha, self.progress, self.required, self.least,
                choose,
            )  # fmt: skip
        if trust.keeps_all(config.first_step, self.warm, self.opens, session):
            end = fed[-1]
            progress = max(self.progress, end)
            eviction = algorithm.Eviction(eviction.k, list(fed), end, progress, math.inf)
        return score, eviction

    def processing_list(
        self, ids: Sequence[int], masked: Sequence[bool], delayed_cache: bool
    ) -> list[int]:
        """Section 6, items 1-2: the positions fed in this step."""
        whole = list(range(len(masked)))
        if not any(masked):
            return [] if delayed_cache and self.settled == list(ids) else whole
        if any(self.final[p] for p in whole if masked[p]):
            raise ValueError("a final position is masked again: decoded tokens never change")
        if not (delayed_cache and self.warm):
            return whole
        return [p for p in whole if not self.final[p]]

    def store(self, layer: int, positions: list[int], key_GND: Tensor, value_GND: Tensor) -> None:
        self.slots[layer][0][:, positions] = key_GND
        self.slots[layer][1][:, positions] = value_GND

    @staticmethod
    def mark(written: list[bool], positions: list[int]) -> None:
        for p in positions:
            written[p] = True

    def copy_slots(self) -> History:
        return [(key.clone(), value.clone()) for key, value in self.slots]


@dataclass(frozen=True)
class StepResult:
    """One step of one row. Positions are block offsets, all lists of them ascending."""

    fed: list[int]
    """P."""
    masked: list[int]
    """M: the fed positions that are masked."""
    retained: list[int]
    k: int
    importance0: Tensor
    importance1: Tensor
    delta: Tensor
    """[m], in the order of `masked`; what selection used (the signal's values if there is one)."""
    margin: float
    """How near the deltas are to another selection; inf where nothing depends on their values."""
    logits: Tensor
    """[len(retained), V]."""
    slots: History
    """After the step, per layer: key and value [G, T, D]; zeros where nothing was written yet."""
    written01: list[bool]
    written: list[bool]
    final: list[bool]
    progress: int
    rescued: list[int] = field(default_factory=list)
    """E, if the row was in need: part of `retained`."""
    c_star: float = math.nan
    """Section 11; NaN where it decides nothing."""
    need_margin: float = math.inf
    """How near c* is to tau; inf where nothing depends on its value."""

    @property
    def retain_mask(self) -> list[bool]:
        return [p in self.retained for p in range(len(self.written))]
