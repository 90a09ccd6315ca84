"""Whole generation of one row: prefill, decode and commit blocks (docs/algorithm.md, section 7).

Rows of a batch do not influence one another, so a batch is a loop over rows; a row that finishes
its block early would only idle until the common commit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import Qwen3ForCausalLM

from tests.reference import algorithm, qwen3
from tests.reference.state import Config, RowState, StepResult
from tests.reference.system import Signal, focus_step
from tests.reference.trust import Judge, Strategy

__all__ = [
    "Decoding",
    "Generated",
    "StepTrace",
    "Strategy",
    "decode",
    "generate_batch",
    "generate_row",
]


@dataclass(frozen=True)
class Decoding:
    """Section 7: which of the kept masked positions a step decodes. Greedy in the tokens.

    threshold: all with confidence >= confidence_threshold, else the most confident one;
    fixed: the tokens_per_step most confident; sequential: the tokens_per_step leftmost.
    """

    strategy: Strategy = "threshold"
    confidence_threshold: float = 0.9
    tokens_per_step: int = 1
    ban_mask_token: bool = False
    """Give the mask token's logit -inf before softmax and argmax (the page leaves this open)."""
    shifted: bool = False
    """The token at p is predicted by row p - 1: of the block, or of what stands before it."""

    def judge(self, mask_id: int) -> Judge:
        """What rescue must know of it; the mask token is left out there in any case."""
        return Judge(mask_id, self.strategy, self.tokens_per_step, self.shifted)


@dataclass(frozen=True)
class StepTrace:
    """What one decode step did, and how near each of its decisions was to another outcome."""

    block: int
    fed: list[int]
    retained: list[int]
    retain_mask: list[bool]
    k: int
    decoded: dict[int, int]
    """Position -> token."""
    confidence: dict[int, float]
    """Of every candidate (masked and kept)."""
    selection_margin: float
    confidence_margin: float
    argmax_margin: float
    rescued: list[int]
    """Part of `retained`."""
    c_star: float
    need_margin: float
    importances: tuple[Tensor, Tensor] = field(repr=False)

    @property
    def margin(self) -> float:
        """Mixed units (delta, probability, logit): only good for `is it about zero`."""
        return min(
            self.selection_margin, self.confidence_margin, self.argmax_margin, self.need_margin
        )


@dataclass
class Generated:
    """Tokens without the prompt, and everything needed to compare step by step."""

    tokens: list[int] = field(default_factory=list)
    steps_per_block: list[int] = field(default_factory=list)
    steps: list[StepTrace] = field(default_factory=list)
    history: qwen3.History = field(default_factory=list, repr=False)
    """K/V of prompt and committed blocks."""

    @property
    def margin(self) -> float:
        return min((step.margin for step in self.steps), default=math.inf)


def decode(
    result: StepResult,
    masked: Sequence[bool],
    mask_id: int,
    decoding: Decoding,
    block: int,
    before_V: Tensor,
) -> StepTrace:
    """Section 7: tokens for some of the masked kept positions of one step."""
    places, logits = result.retained, result.logits.clone()
    if decoding.shifted:
        places = [0, *(p + 1 for p in result.retained if p + 1 < len(masked))]
        logits = torch.stack([before_V, *logits[: len(places) - 1]])
    candidates = [masked[p] for p in places]
    if decoding.ban_mask_token:
        logits[:, mask_id] = -math.inf
    guesses = [algorithm.greedy(row) for row in logits]
    confidence = [guess.confidence for guess in guesses]
    match decoding.strategy:
        case "threshold":
            choice = algorithm.unmask(confidence, candidates, decoding.confidence_threshold)
        case "fixed":
            choice = algorithm.most_confident(confidence, candidates, decoding.tokens_per_step)
        case "sequential":
            choice = algorithm.leftmost(candidates, decoding.tokens_per_step)
    return StepTrace(
        block=block,
        fed=result.fed,
        retained=result.retained,
        retain_mask=result.retain_mask,
        k=result.k,
        decoded={places[j]: guesses[j].token for j in choice.indices},
        confidence={
            p: guess.confidence
            for p, guess, is_candidate in zip(places, guesses, candidates, strict=True)
            if is_candidate
        },
        selection_margin=result.margin,
        confidence_margin=choice.margin,
        argmax_margin=min(guesses[j].margin for j in choice.indices),
        rescued=result.rescued,
        c_star=result.c_star,
        need_margin=result.need_margin,
        importances=(result.importance0, result.importance1),
    )


@torch.no_grad()
def generate_row(
    model: Qwen3ForCausalLM,
    prompt_ids: Sequence[int] | Tensor,
    *,
    blocks: int,
    block_length: int,
    mask_id: int,
    config: Config | None = None,
    decoding: Decoding | None = None,
    signal: Signal | None = None,
) -> Generated:
    """Prefill the prompt in one dense forward (all of it visible to all of it), then the blocks."""
    config, decoding, opens = config or Config(), decoding or Decoding(), True
    prompt = torch.tensor([int(i) for i in prompt_ids], dtype=torch.long)
    generated = Generated(history=qwen3.no_history(model))
    before_V = torch.zeros(model.config.vocab_size)
    if len(prompt):
        logits, stored = qwen3.dense_forward(
            model, prompt, generated.history, torch.arange(len(prompt))
        )
        generated.history = qwen3.extend(generated.history, stored)
        before_V = logits[-1]
    for block in range(blocks):
        ids = torch.full((block_length,), mask_id)
        masked = [True] * block_length
        position_ids = len(prompt) + block * block_length + torch.arange(block_length)
        state = RowState.fresh(model, block_length, opens)
        steps = 0
        while any(masked):
            result = focus_step(
                model,
                state,
                ids,
                masked,
                generated.history,
                position_ids,
                config=config,
                signal=signal,
                judge=decoding.judge(mask_id),
                before_V=before_V if len(prompt) or block else None,
            )
            trace = decode(result, masked, mask_id, decoding, block, before_V)
            for p, token in trace.decoded.items():
                ids[p], masked[p] = token, False
            state.record(len(trace.decoded))
            generated.steps.append(trace)
            steps += 1
        opens = state.opens_next(config.alpha)
        logits, stored = qwen3.dense_forward(model, ids, generated.history, position_ids)
        before_V = logits[-1]
        generated.history = qwen3.extend(generated.history, stored)
        generated.tokens += ids.tolist()
        generated.steps_per_block.append(steps)
    return generated


def generate_batch(
    model: Qwen3ForCausalLM,
    prompts: Sequence[Sequence[int] | Tensor],
    *,
    blocks: int,
    block_length: int,
    mask_id: int,
    config: Config | None = None,
    decoding: Decoding | None = None,
    signal: Signal | None = None,
) -> list[Generated]:
    """Each row alone; prompts may differ in length (left padding must not change anything)."""
    return [
        generate_row(
            model,
            prompt,
            blocks=blocks,
            block_length=block_length,
            mask_id=mask_id,
            config=config,
            decoding=decoding,
            signal=signal,
        )
        for prompt in prompts
    ]
