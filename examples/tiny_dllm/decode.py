"""Dense block-diffusion decoding in plain eager PyTorch: what every other decoder is held against.

The prompt sees the whole prompt, a block sees the prompt, the blocks before it and itself; the only
thing hidden is left padding. A finished block is committed by one forward without masks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from language import BLOCK_LENGTH
from tasks import MAX_ANSWER, MAX_PROMPT
from torch import Tensor
from transformers import (
    AutoTokenizer,
    DynamicCache,
    PreTrainedTokenizerFast,
    Qwen3ForCausalLM,
)

CHECKPOINT = Path(__file__).parent / "checkpoint"
ALIGNED = Path(__file__).parent / "aligned_checkpoint"  # the delta trained too: see the README
MAX_BLOCKS = MAX_ANSWER // BLOCK_LENGTH

# called after each denoising step with masked as fed and decoded by it, both bool [B, T]
Observer = Callable[[Tensor, Tensor], None]


class PromptError(ValueError):
    """A prompt that this model cannot be asked."""


@dataclass
class Decoded:
    """The answer to one prompt, and how many tokens each step of each block decoded."""

    text: str
    blocks: list[list[int]]
    ended: bool  # an EOS was decoded


def load(folder: Path = CHECKPOINT) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast]:
    """The model, in eval mode, and its tokenizer."""
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"no checkpoint in {folder}: train one with train.py --out {folder}"
        )
    model = Qwen3ForCausalLM.from_pretrained(folder)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def encode(tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Left-padded ids [B, S] and the mask of real tokens [B, S]; refuses what was never trained."""
    if not prompts:
        raise PromptError("there are no prompts")
    rows = []
    for prompt in prompts:
        if not prompt.strip():
            raise PromptError("the prompt is empty")
        encoded = tokenizer(prompt, return_offsets_mapping=True)
        row = encoded["input_ids"]
        unknown = [
            prompt[start:end]
            for token, (start, end) in zip(row, encoded["offset_mapping"], strict=True)
            if token in tokenizer.all_special_ids
        ]
        if unknown:
            words = ", ".join(map(repr, unknown))
            raise PromptError(f"unknown words in the prompt {prompt!r}: {words}")
        if len(row) > MAX_PROMPT:
            raise PromptError(f"the prompt has {len(row)} tokens, the most is {MAX_PROMPT}")
        rows.append(row)
    width = max(map(len, rows))
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    real = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows])
    return ids, real


def first_max(values: Tensor) -> Tensor:
    """Index of the largest value of the last axis, the first of equals."""
    return (values == values.amax(-1, keepdim=True)).to(torch.uint8).argmax(-1)


def choose(logits: Tensor, masked: Tensor, threshold: float, mask_id: int) -> tuple[Tensor, Tensor]:
    """The tokens [B, T], and which positions are decoded: the sure ones, or the surest one."""
    never = torch.arange(logits.shape[-1]) == mask_id  # a mask decoded as a mask would not end
    logits = logits.float().masked_fill(never, float("-inf"))
    tokens = first_max(logits)
    confidence = torch.softmax(logits, -1).amax(-1).masked_fill(~masked, -1.0)
    sure = confidence >= threshold
    surest = torch.arange(masked.shape[1]) == first_max(confidence)[:, None]
    return tokens, torch.where(sure.any(1, keepdim=True), sure, surest & masked)


@torch.inference_mode()
def decode(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    *,
    threshold: float = 0.9,
    observe: Observer | None = None,
) -> list[Decoded]:
    """Answer all prompts as one batch; rows advance alone in a block, blocks are in lockstep."""
    ids, real = encode(tokenizer, prompts)
    eos, mask_id, rows = tokenizer.eos_token_id, tokenizer.mask_token_id, len(prompts)
    cache = DynamicCache()

    def forward(ids: Tensor, positions: Tensor, visible: Tensor) -> Tensor:
        # the fourth is past_key_values, or cache from transformers 5.24 on
        return model(ids, visible, positions, cache, use_cache=True).logits

    prompt_visible = real[:, None, :] | torch.eye(ids.shape[1], dtype=torch.bool)
    forward(ids, (real.cumsum(1) - 1).clamp(min=0), prompt_visible[:, None])
    positions = real.sum(1, keepdim=True) + torch.arange(BLOCK_LENGTH)
    ended = torch.zeros(rows, dtype=torch.bool)
    answers: list[Tensor] = []
    results = [Decoded("", [], False) for _ in prompts]
    for _ in range(MAX_BLOCKS):
        block = torch.full((rows, BLOCK_LENGTH), mask_id).masked_fill(ended[:, None], eos)
        real = torch.cat([real, torch.ones_like(block, dtype=torch.bool)], 1)
        visible = real[:, None, None, :].expand(-1, 1, BLOCK_LENGTH, -1)
        for row in (~ended).nonzero()[:, 0].tolist():
            results[row].blocks.append([])
        while (masked := block == mask_id).any():
            logits = forward(block, positions, visible)
            cache.crop(-BLOCK_LENGTH)
            tokens, decoded = choose(logits, masked, threshold, mask_id)
            if observe is not None:
                observe(masked, decoded)
            block = torch.where(decoded, tokens, block)
            for row, count in enumerate(decoded.sum(1).tolist()):
                if count:
                    results[row].blocks[-1].append(count)
        answers.append(block)
        ended = ended | (block == eos).any(1)
        if ended.all():
            break
        forward(block, positions, visible)  # commit: this block's exact K/V joins the history
        positions = positions + BLOCK_LENGTH
    for result, row, done in zip(
        results, torch.cat(answers, 1).tolist(), ended.tolist(), strict=True
    ):
        result.text = tokenizer.decode(row[: row.index(eos)] if done else row)
        result.ended = done
    return results
