"""What one row remembers within a block (docs/algorithm.md, section 0), and what a step reports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from transformers import Qwen3ForCausalLM

from tests.reference import algorithm, qwen3
from tests.reference.qwen3 import History

Visibility = Literal["written", "prefix"]


@dataclass(frozen=True)
class Config:
    """Sections 2, 5 and 6: what a step may be told to do differently."""

    alpha: float = 1.5
    visibility: Visibility = "written"
    delayed_cache: bool = True
    stale_kv: bool = True
    """Without: of earlier steps of the block, only the K/V of final tokens is visible."""


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

    @classmethod
    def fresh(cls, model: Qwen3ForCausalLM, tokens: int) -> RowState:
        slots = []
        for key, _ in qwen3.no_history(model):
            groups, _, head_dim = key.shape
            slots.append(
                (key.new_zeros(groups, tokens, head_dim), key.new_zeros(groups, tokens, head_dim))
            )
        return cls(slots, [False] * tokens, [False] * tokens, [False] * tokens)

    @property
    def avg(self) -> float:
        return algorithm.average(self.decoded_sum, self.decode_steps)

    def record(self, decoded: int) -> None:
        """Section 2: to be called after each decode step."""
        if decoded > 0:
            self.decoded_sum += decoded
            self.decode_steps += 1

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

    @property
    def retain_mask(self) -> list[bool]:
        return [p in self.retained for p in range(len(self.written))]
