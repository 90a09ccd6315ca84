"""Block diffusion over a Hugging Face cache: the denoising loop, for eager and compiled models."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

from focus_compile.decoding import STRATEGIES, choose, propose
from focus_compile.session import Session, current_session, session

__all__ = ["Generated", "generate"]


@dataclass
class Generated:
    """What :func:`generate` returns with ``return_dict=True``.

    Attributes:
        sequences: int64 ``[B, P + new]``: prompt and answer; pad after a row's end of text.
        steps_per_block: for each block, int64 ``[B]``: denoising steps of each row.
        forwards: denoising forwards of the batch, commits and prefill not counted.
        decoded: tokens decoded by these.
        fed_fraction, retained_fraction: of the block's tokens, over all denoising forwards; 1 for
            a model that computes every token.
        focus_steps: denoising forwards that ran FOCUS's prefix and suffix.
    """

    sequences: Tensor
    steps_per_block: list[Tensor] = field(default_factory=list)
    forwards: int = 0
    decoded: int = 0
    fed_fraction: float = 1.0
    retained_fraction: float = 1.0
    focus_steps: int = 0

    @property
    def tokens_per_forward(self) -> float:
        """Tokens decoded per denoising forward of the batch."""
        return self.decoded / self.forwards if self.forwards else 0.0


@dataclass
class _Rows:
    """The growing batch: sequences ``[B, L]``, validity of their tokens, rows that go on."""

    sequences: Tensor
    valid: Tensor
    active: Tensor


@torch.no_grad()
def generate(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int,
    mask_token_id: int,
    block_length: int = 32,
    remasking_strategy: str = "threshold",
    confidence_threshold: float = 0.9,
    denoising_steps: int | None = None,
    tokens_per_step: int | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_token_id: int | None = None,
    pad_token_id: int | None = None,
    eos_early_stop: bool = True,
    streamer: BaseStreamer | None = None,
    logits_processor: LogitsProcessorList | None = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
    return_dict: bool = False,
) -> Tensor | Generated:
    """Generate text block by block with a block-diffusion LLM.

    Works alike for an eager model, ``torch.compile(model)`` and ``torch.compile(model,
    backend="focus")``. Every forward gets a bool mask ``[B, 1, T, S + T]`` that hides left padding
    only: the prompt attends to itself in both directions, a block to the history and to itself.
    Blocks are in lockstep; a row that has ended stays in the batch, idle. Runs in a session of its
    own, which takes alpha, visibility and signal from the session around it.

    Args:
        input_ids: int64 ``[B, P]``, prompts padded on the left; attention_mask: ``[B, P]``, 0 at
            padding.
        max_new_tokens: rounded up to whole blocks of ``block_length``.
        remasking_strategy: ``"threshold"``: decode every token of confidence >=
            ``confidence_threshold``, or else the most confident one; ``"fixed"``: the
            ``tokens_per_step`` most confident ones; ``"sequential"``: the leftmost ones.
        denoising_steps: sets ``tokens_per_step`` to ``ceil(block_length / denoising_steps)``.
        temperature: 0 decodes greedily; else tokens are sampled, after ``top_k`` and ``top_p``.
        eos_token_id: ends a row; ``eos_early_stop=False`` goes on to the end of the last block.
        streamer: gets each committed block (batch size 1). progress: show a bar.

    Returns:
        sequences int64 ``[B, P + new]``, or :class:`Generated`.

    Raises:
        ValueError: an argument is out of range.
    """
    count = _tokens_per_step(block_length, denoising_steps, tokens_per_step)
    _check(input_ids, max_new_tokens, block_length, remasking_strategy, confidence_threshold)
    processors = _processors(logits_processor, temperature, top_k, top_p)
    pad = pad_token_id if pad_token_id is not None else eos_token_id
    fill = mask_token_id if pad is None else pad
    valid = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    batch = input_ids.shape[0]
    active = torch.ones(batch, dtype=torch.bool, device=input_ids.device)
    rows = _Rows(input_ids, valid.bool(), active)
    result = Generated(input_ids)
    cache = DynamicCache(config=model.config)
    blocks = -(-max_new_tokens // block_length)

    def forward(ids: Tensor) -> Tensor:
        """Feed the last ``T`` tokens of the rows; the cache must hold the others."""
        length = ids.shape[1]
        places = rows.valid.long().cumsum(1) - 1
        mask = rows.valid[:, None, None, :].expand(-1, 1, length, -1)
        out = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=places.clamp_min(0)[:, -length:],
            past_key_values=cache,
            use_cache=True,
        )
        return out.logits

    outer = current_session() or Session()
    with (
        session(mask_token_id, outer.alpha, outer.visibility, outer.signal) as focus,
        Progress(disable=not progress, transient=True) as bar,
    ):
        focus.commits_exactly = True
        task = bar.add_task("blocks", total=blocks)
        focus.masked = torch.zeros_like(input_ids, dtype=torch.bool)
        forward(input_ids)
        for _ in range(blocks):
            block = torch.full((batch, block_length), mask_token_id, device=input_ids.device)
            block = torch.where(rows.active.unsqueeze(1), block, fill)
            masked = rows.active.unsqueeze(1).expand(batch, block_length)
            rows.valid = torch.cat([rows.valid, torch.ones_like(block, dtype=torch.bool)], 1)
            steps = torch.zeros(batch, dtype=torch.int64, device=input_ids.device)
            while bool(masked.any()):
                steps += masked.any(1)
                focus.masked, focus.retain_mask = masked, None
                logits = forward(block)
                cache.crop(-block_length)
                where = masked
                if focus.retain_mask is not None:
                    where = masked & focus.retain_mask
                    result.focus_steps += 1
                candidates = propose(
                    logits, where, rows.sequences, processors, temperature > 0, generator
                )
                chosen = choose(candidates, where, remasking_strategy, confidence_threshold, count)
                block = torch.where(chosen, candidates.tokens, block)
                masked = masked & ~chosen
                result.forwards += 1
                result.decoded += int(chosen.sum())
            focus.masked = torch.zeros_like(masked)
            forward(block)
            rows.sequences = torch.cat([rows.sequences, block], 1)
            result.steps_per_block.append(steps)
            if streamer is not None:
                streamer.put(block.cpu())
            _stop(rows, block, eos_token_id, eos_early_stop, stopping_criteria)
            bar.advance(task)
            if not bool(rows.active.any()):
                break
        if focus.stats.canvas:
            result.fed_fraction = focus.stats.fed_fraction
            result.retained_fraction = focus.stats.retained_fraction
    if streamer is not None:
        streamer.end()
    result.sequences = _after_end(rows.sequences, input_ids.shape[1], eos_token_id, fill)
    return result if return_dict else result.sequences


def _tokens_per_step(block: int, steps: int | None, count: int | None) -> int:
    if steps is not None and count is not None:
        raise ValueError("give denoising_steps or tokens_per_step, not both")
    if steps is not None:
        if steps < 1:
            raise ValueError(f"denoising_steps={steps}: expected at least 1")
        return -(-block // steps)
    if count is not None and count < 1:
        raise ValueError(f"tokens_per_step={count}: expected at least 1")
    return count or 1


def _check(ids: Tensor, new: int, block: int, strategy: str, threshold: float) -> None:
    if ids.dim() != 2 or ids.shape[0] == 0 or ids.shape[1] == 0:
        raise ValueError(
            f"input_ids has shape {tuple(ids.shape)}: expected [batch, prompt], not empty"
        )
    if new < 1 or block < 1:
        raise ValueError(f"max_new_tokens={new}, block_length={block}: expected at least 1")
    if strategy not in STRATEGIES:
        raise ValueError(f"remasking_strategy={strategy!r}: expected one of {STRATEGIES}")
    if not 0 <= threshold <= 1:
        raise ValueError(f"confidence_threshold={threshold}: expected a number from 0 to 1")


def _processors(
    given: LogitsProcessorList | None, temperature: float, top_k: int | None, top_p: float | None
) -> LogitsProcessorList:
    processors = LogitsProcessorList(given or [])
    if temperature > 0:
        processors.append(TemperatureLogitsWarper(temperature))
        if top_k is not None:
            processors.append(TopKLogitsWarper(top_k))
        if top_p is not None:
            processors.append(TopPLogitsWarper(top_p))
    return processors


def _stop(
    rows: _Rows, block: Tensor, eos: int | None, early: bool, criteria: StoppingCriteriaList | None
) -> None:
    """Mark rows that have ended."""
    if eos is not None and early:
        rows.active = rows.active & ~(block == eos).any(1)
    if criteria:
        none: Any = None
        rows.active = rows.active & ~criteria(rows.sequences, none)


def _after_end(sequences: Tensor, prompt: int, eos: int | None, fill: int) -> Tensor:
    """Replace what follows the first end of text of an answer."""
    if eos is None:
        return sequences
    answer = sequences[:, prompt:]
    ended = (answer == eos).long().cumsum(1)
    after = (ended - (answer == eos).long()) > 0
    return torch.cat([sequences[:, :prompt], answer.masked_fill(after, fill)], 1)
