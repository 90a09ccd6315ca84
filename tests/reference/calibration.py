"""Calibration (docs/algorithm.md, section 13): candidates replayed along dense decoding.

One row at a time. F, N, D, S, e and x are those of the section.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor
from transformers import Qwen3ForCausalLM

from tests.reference import algorithm, trust
from tests.reference.generation import Decoding, generate_row
from tests.reference.state import Config, RowState
from tests.reference.trust import Signal, at_least

PAPER: Signal = "delta"
SAME, DEARER, NO_GAIN, ENOUGH = 1.02, 1.05, 0.95, 200
IN_VAIN, FORCED_ENOUGH = 0.03, 20


@dataclass(frozen=True)
class DenseStep:
    """One step of one row of dense decoding; lists of length T, importances [m]."""

    masked: list[bool]
    decoded: list[int]
    """D."""
    confidence: dict[int, float]
    """Of every masked position."""
    importances: tuple[Tensor, Tensor]
    bias: Tensor | None = None
    """[T]: that of a signal which is not of the model's making, as random."""


@dataclass(frozen=True)
class Candidate:
    signal: Signal
    first_step: Literal["evict", "open"]


@dataclass(frozen=True)
class Replayed:
    """What a candidate would have done in one step."""

    fed: list[int]
    kept: list[int]
    decoded: list[int]
    sure: list[int]
    evicts: bool
    missed: bool
    """x: it would have been rescued."""
    cost: int
    gain: int
    margin: float


def replay(
    block: Sequence[DenseStep], candidate: Candidate, alpha: float, threshold: float, layers: int
) -> list[Replayed]:
    """Sections 2 to 4, 6, 10 and 12 along one block, with dense's masks and counts."""
    tokens = len(block[0].masked)
    row = RowState([], [False] * tokens, [False] * tokens, [False] * tokens)
    config = Config(alpha, signal=candidate.signal, first_step=candidate.first_step)
    steps = []
    for number, dense in enumerate(block):
        fed = row.processing_list(range(tokens), dense.masked, delayed_cache=True)
        _, made = row.decide(config, fed, dense.masked, dense.importances, bias=dense.bias)
        sure = [p for p in dense.decoded if at_least(dense.confidence[p], threshold)]
        hits = [p for p in dense.decoded if p in made.kept]
        evicts = len(made.kept) < len(fed)
        missed = evicts and not any(p in made.kept for p in sure)
        more = len(fed) - len(made.kept) if missed else 0
        steps.append(
            Replayed(
                fed=fed,
                kept=made.kept,
                decoded=dense.decoded,
                sure=sure,
                evicts=evicts,
                missed=missed,
                cost=2 * len(fed) + (layers - 2) * (len(made.kept) + more),
                gain=len(dense.decoded) if missed else max(1, len(hits)),
                margin=made.margin,
            )
        )
        computed = fed if missed else made.kept
        row.memory = trust.remember(
            row.memory,
            number,
            {p: dense.confidence[p] for p in computed if dense.masked[p]},
            tokens,
            shifted=False,
        )
        row.progress = max([made.progress, *fed]) if missed else made.progress
        row.warm = True
        row.final = algorithm.finalise(dense.masked, fed, row.final)
        row.steps += 1
        row.record(len(dense.decoded))
    return steps


@dataclass(frozen=True)
class Prediction:
    predicted: float
    """Cost relative to dense, per decoded token."""
    hit: float | None
    """None: there was no step to tell it by."""
    evicting: int
    """e-steps."""


def predict(steps: Sequence[Replayed], layers: int, tokens: int) -> Prediction:
    """Over all row-steps of a candidate."""
    decoded = sum(len(step.decoded) for step in steps)
    ours = Fraction(sum(step.cost for step in steps), sum(step.gain for step in steps))
    dense = Fraction(tokens * layers * len(steps), decoded)
    told = [step for step in steps if step.evicts and step.sure]
    hits = sum(any(p in step.kept for p in step.sure) for step in told)
    return Prediction(
        predicted=float(ours / dense),
        hit=hits / len(told) if told else None,
        evicting=sum(step.evicts for step in steps),
    )


@dataclass(frozen=True)
class Advice:
    candidate: Candidate | None
    """None: do not evict."""
    judged: bool
    """False: too few e-steps to tell signals apart."""


def advise(predictions: Mapping[Candidate, Prediction]) -> Advice:
    """Section 13's choice."""
    judged = max(found.evicting for found in predictions.values()) >= ENOUGH
    cost = {
        candidate: found.predicted
        for candidate, found in predictions.items()
        if judged or candidate.signal == PAPER
    }
    best = min(cost, key=lambda candidate: cost[candidate])
    if cost[best] >= NO_GAIN:
        return Advice(None, judged)
    paper = [candidate for candidate in cost if candidate.signal == PAPER]
    near = [candidate for candidate in paper if cost[candidate] <= SAME * cost[best]]
    chosen = min(near, key=lambda candidate: cost[candidate], default=best)
    opened = Candidate(chosen.signal, "open")
    if cost.get(opened, math.inf) <= DEARER * cost[chosen]:
        chosen = opened
    return Advice(chosen, judged)


def gate(
    threshold: float,
    row_steps: int,
    forced: Sequence[float],
    chosen: Sequence[Replayed],
    layers: int,
) -> float:
    """Section 13's tau.

    forced: the confidence that dense decoded with where it was below the threshold, one for each
    such step; chosen: all row-steps of the chosen candidate.
    """
    evicting = [step for step in chosen if step.evicts]
    saved = sum((layers - 2) * (len(step.fed) - len(step.kept)) for step in evicting)
    paid = sum(2 * len(step.fed) + (layers - 2) * len(step.kept) for step in evicting)
    return quantile(threshold, len(forced) / row_steps, saved / paid if paid else 0.0, forced)


def quantile(threshold: float, phi: float, rho: float, forced: Sequence[float]) -> float:
    if phi * rho == 0 or len(forced) < FORCED_ENOUGH:
        return threshold
    q = IN_VAIN / (phi * rho)
    if q >= 1:
        return threshold
    return min(threshold, sorted(forced)[math.floor(q * len(forced))])


@dataclass(frozen=True)
class Trajectory:
    """Dense decoding of one prompt."""

    blocks: list[list[DenseStep]] = field(default_factory=list)

    def forced(self, threshold: float) -> list[float]:
        return [
            step.confidence[p]
            for block in self.blocks
            for step in block
            for p in step.decoded
            if not at_least(step.confidence[p], threshold)
        ]


@torch.no_grad()
def trajectory(
    model: Qwen3ForCausalLM,
    prompt_ids: Sequence[int] | Tensor,
    *,
    blocks: int,
    block_length: int,
    mask_id: int,
    threshold: float,
) -> Trajectory:
    """Dense decoding with the threshold strategy; the mask token is never decoded."""
    generated = generate_row(
        model,
        prompt_ids,
        blocks=blocks,
        block_length=block_length,
        mask_id=mask_id,
        config=Config(alpha=1e9, delayed_cache=False),
        decoding=Decoding("threshold", threshold, ban_mask_token=True),
    )
    found = Trajectory([[] for _ in range(blocks)])
    for step in generated.steps:
        masked = [p in step.confidence for p in range(block_length)]
        decoded = sorted(step.decoded)
        found.blocks[step.block].append(
            DenseStep(masked, decoded, step.confidence, step.importances)
        )
    return found
