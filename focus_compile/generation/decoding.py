"""One denoising step's decisions: which token each masked position would take, and which are kept.

docs/algorithm.md section 7. Plain tensors in, plain tensors out; no model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from focus_compile.generation.request import fraction, whole
from focus_compile.ops.likelihood import most_probable
from focus_compile.runtime.demand import Demand

__all__ = [
    "STRATEGIES",
    "Candidates",
    "Decoder",
    "Strategy",
    "choose",
    "count_per_step",
    "propose",
    "warpers",
]

STRATEGIES = ("threshold", "fixed", "sequential")


@dataclass(frozen=True)
class Candidates:
    """Proposed tokens int64 ``[B, T]`` and their probability fp32 ``[B, T]``; -1 where none."""

    tokens: Tensor
    confidence: Tensor


Strategy = Callable[[Candidates, Tensor], Tensor]
"""(candidates, where they are: bool ``[B, T]``) -> positions to decode, bool ``[B, T]``."""


def propose(
    scores: Tensor,
    where: Tensor,
    context: Tensor,
    processors: LogitsProcessorList,
    *,
    never: int | None = None,
    sample: bool = False,
    generator: torch.Generator | None = None,
) -> Candidates:
    """Sampled (or greedy) token and its probability at the positions of ``where``.

    Args:
        scores: logits ``[M, V]`` of the positions of ``where`` bool ``[B, T]``, in row-major order.
        context: int64 ``[M, L]``, what stands before each of them, for the processors.
        never: a token that has no probability, the mask token.
        sample: draw from the processed distribution; else take its largest, ties to the lowest id.
    """
    if processors or sample:
        scores = scores.to(torch.float32, copy=never is not None)
        if never is not None:
            scores[:, never : never + 1].fill_(-torch.inf)
        scores, never = processors(context, scores), None  # type: ignore[arg-type]
    if sample:
        probabilities = torch.softmax(scores, dim=-1)
        picked = torch.multinomial(probabilities, 1, generator=generator).squeeze(1)
        confidence = probabilities.gather(1, picked.unsqueeze(1)).squeeze(1)
    else:
        confidence, picked = most_probable(scores, never)
    tokens = torch.zeros(where.shape, dtype=torch.int64, device=where.device)
    values = torch.full(where.shape, -1.0, dtype=torch.float32, device=where.device)
    return Candidates(
        tokens.masked_scatter(where, picked), values.masked_scatter(where, confidence)
    )


def choose(
    candidates: Candidates,
    where: Tensor,
    strategy: str,
    *,
    threshold: float,
    count: int,
    strict: bool = False,
) -> Tensor:
    """Positions to decode, bool ``[B, T]``, at least one in each row that has a candidate.

    ``threshold``: every confidence >= ``threshold`` (``strict``: > it), or else the most confident;
    ``fixed``: the ``count`` most confident; ``sequential``: the ``count`` leftmost. Ties go left.
    """
    if strategy == "sequential":
        return where & (where.cumsum(1) <= count)
    order = torch.sort(candidates.confidence, dim=1, descending=True, stable=True).indices
    rank = order.argsort(1)
    if strategy == "fixed":
        return where & (rank < count)
    confidence = candidates.confidence
    passing = confidence > threshold if strict else confidence >= threshold
    return where & (passing | (rank == 0))


@dataclass(frozen=True)
class Decoder:
    """How a generation turns logits into tokens; checks itself.

    Attributes:
        strategy: one of ``STRATEGIES``, or a function; threshold: of confidence; count: tokens per
            step.
        processors: what logits go through; never: the mask token, which is not decoded; sample:
            whether tokens are drawn, with ``generator``.
    """

    strategy: str | Strategy
    threshold: float
    count: int
    processors: LogitsProcessorList
    never: int
    sample: bool
    generator: torch.Generator | None

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES and not callable(self.strategy):
            raise ValueError(
                f"remasking_strategy={self.strategy!r}: expected one of {STRATEGIES} or a function"
            )
        if not 0 <= self.threshold <= 1:
            raise ValueError(
                f"confidence_threshold={self.threshold}: expected a number from 0 to 1"
            )
        if self.count < 1:
            raise ValueError(f"tokens_per_step={self.count}: expected at least 1")

    @property
    def demand(self) -> Demand | None:
        """When what a row has retained is enough for it to decode; None: a function decides."""
        if isinstance(self.strategy, str):
            return Demand(self.threshold, self.strategy, self.count)
        return None

    def step(self, scores: Tensor, where: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Positions to decode bool ``[B, T]``, and tokens int64 ``[B, T]`` for them.

        ``scores`` ``[M, V]`` are the logits of the positions of ``where``, in row-major order;
        ``context`` ``[M, L]``: the sequence of the row of each.

        Raises:
            ValueError: a function chose no position, or one that is no candidate.
        """
        candidates = propose(
            scores, where, context, self.processors,
            never=self.never, sample=self.sample, generator=self.generator,
        )  # fmt: skip
        if isinstance(self.strategy, str):
            chosen = choose(
                candidates, where, self.strategy, threshold=self.threshold, count=self.count
            )
        else:
            chosen = self.strategy(candidates, where)
            if not bool(chosen.any()) or bool((chosen & ~where).any()):
                raise ValueError("remasking_strategy: expected some candidates, and no others")
        return chosen, candidates.tokens


def warpers(
    given: Sequence[LogitsProcessor] | None,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> LogitsProcessorList:
    """The caller's processors; what sampling needs, if any.

    ``top_k`` of 0 or -1, and ``top_p`` of 1, keep all tokens.
    """
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature={temperature}: expected a number >= 0")
    count = 0 if top_k is None else whole("top_k", top_k, least=-1)
    share = 1.0 if top_p is None else fraction("top_p", top_p)
    if not 0 <= share <= 1:
        raise ValueError(f"top_p={top_p}: expected a number from 0 to 1")
    processors = LogitsProcessorList(given or [])
    if temperature > 0:
        processors.append(TemperatureLogitsWarper(temperature))
        if count > 0:
            processors.append(TopKLogitsWarper(count))
        if share < 1:
            processors.append(TopPLogitsWarper(share))
    return processors


def count_per_step(block: int, steps: int | None, count: int | None) -> int:
    """From ``denoising_steps`` or ``tokens_per_step``, whichever is given; else 1."""
    if steps is not None and count is not None:
        raise ValueError("give denoising_steps or tokens_per_step, not both")
    if steps is None:
        return 1 if count is None else count
    if steps < 1:
        raise ValueError(f"denoising_steps={steps}: expected at least 1")
    return -(-block // steps)
