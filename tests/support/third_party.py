"""A generation loop as public dLLM repositories write it, and the same loop over the reference.

The first knows nothing of FOCUS: it denoises a block without storing its keys and values, then
stores them with one forward of the finished block. Prompts need not end where a block ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, Qwen3ForCausalLM

from tests.reference import qwen3
from tests.reference.state import Config, RowState, StepResult
from tests.reference.system import focus_step
from tests.support.harness import CACHE, MASK, build_model

BLOCK = 9
THRESHOLD = 0.05


def polite_model(**options: Any) -> Qwen3ForCausalLM:
    """A model that never proposes the mask token, on which such loops would hang."""
    model = build_model(**options)
    with torch.no_grad():
        model.lm_head.weight[MASK] = 0
    return model


class Denoiser:
    """A model and its cache; ``store_kv`` as in the repositories' own modeling files."""

    def __init__(self, model: Callable[..., Any], config: Any) -> None:
        self.model = model
        self.cache = DynamicCache(config=config)

    def logits(self, ids: Tensor, store_kv: bool) -> Tensor:
        batch, length = ids.shape
        past = self.cache.get_seq_length()
        visible = torch.ones(batch, 1, 1, past + length, dtype=torch.bool)
        out = self.model(
            input_ids=ids,
            attention_mask=visible.expand(-1, -1, length, -1),
            position_ids=torch.arange(past, past + length).expand(batch, -1),
            use_cache=True,
            **{CACHE: self.cache},
        )
        if not store_kv:
            self.cache.crop(-length)
        logits: Tensor = out.logits
        return logits


def pick(logits: Tensor, masked: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Tokens, and which to take: all that are likely enough, at least one in a row with masks."""
    confidence, tokens = torch.softmax(logits, -1).max(-1)
    confidence = confidence.masked_fill(~masked, -1)
    best = torch.zeros_like(masked).scatter(1, confidence.argmax(1, keepdim=True), True)
    return tokens, masked & (best | (confidence >= threshold))


@torch.no_grad()
def generate(
    model: Callable[..., Any],
    config: Any,
    prompt: Tensor,
    blocks: int,
    watch: Callable[[], None] = lambda: None,
    threshold: float = THRESHOLD,
) -> Tensor:
    """Prompt and answer, int64 ``[B, L]``; ``watch`` is called after every denoising forward."""
    denoiser = Denoiser(model, config)
    whole = prompt.shape[1] // BLOCK * BLOCK
    x = torch.full((len(prompt), whole + blocks * BLOCK), MASK)
    x[:, : prompt.shape[1]] = prompt
    if whole:
        denoiser.logits(x[:, :whole], store_kv=True)
    for start in range(whole, x.shape[1], BLOCK):
        block = x[:, start : start + BLOCK]
        while (masked := block == MASK).any():
            logits = denoiser.logits(block, store_kv=False)
            tokens, chosen = pick(logits, masked, threshold)
            watch()
            block[chosen] = tokens[chosen]
        denoiser.logits(block, store_kv=True)
    return x


@dataclass
class Reference:
    """The same loop over the reference, a row at a time; ``steps``: each row's, by forward."""

    model: Qwen3ForCausalLM
    config: Config = field(default_factory=Config)
    steps: list[list[StepResult]] = field(default_factory=list)

    @torch.no_grad()
    def generate(self, prompt: Tensor, blocks: int) -> Tensor:
        whole = prompt.shape[1] // BLOCK * BLOCK
        x = torch.full((len(prompt), whole + blocks * BLOCK), MASK)
        x[:, : prompt.shape[1]] = prompt
        histories = [qwen3.no_history(self.model) for _ in prompt]
        if whole:
            self._store(histories, x[:, :whole], 0)
        for start in range(whole, x.shape[1], BLOCK):
            block = x[:, start : start + BLOCK]
            states = [RowState.fresh(self.model, BLOCK) for _ in block]
            while (block == MASK).any():
                self.steps.append(list(self._denoise(states, block, histories, start)))
            self._store(histories, block, start)
        return x

    def _denoise(
        self, states: list[RowState], block: Tensor, histories: list[qwen3.History], start: int
    ) -> Iterator[StepResult]:
        positions = start + torch.arange(BLOCK)
        for state, ids, history in zip(states, block, histories, strict=True):
            masked = ids == MASK
            result = focus_step(
                self.model, state, ids, masked, history, positions, config=self.config
            )
            if masked.any():
                logits = torch.zeros(1, BLOCK, result.logits.shape[1])
                logits[0, result.retained] = result.logits
                tokens, chosen = pick(logits, masked[None], THRESHOLD)
                ids[chosen[0]] = tokens[chosen]
                state.record(int(chosen.sum()))
            yield result

    def _store(self, histories: list[qwen3.History], ids: Tensor, start: int) -> None:
        positions = start + torch.arange(ids.shape[1])
        for row, history in enumerate(histories):
            _, stored = qwen3.dense_forward(self.model, ids[row], history, positions)
            histories[row] = qwen3.extend(history, stored)
