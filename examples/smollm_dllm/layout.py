"""Training batches, each a pure function of (seed, step).

    [prompt | clean answer, but its last block | the answer, noised | the answer, noised otherwise]

The prompt sees the whole prompt. A clean block sees the prompt, the blocks before and itself. A
noised block sees the prompt, the clean blocks before and itself, never another copy. Prompts are
padded on the left; position ids count real tokens from 0.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from questions import TASKS, Example, draw
from torch import Tensor
from transformers import PreTrainedTokenizerBase

__all__ = ["FILL_WEIGHT", "Batch", "diffusion", "drawn", "noise"]

FILL_WEIGHT = 0.1  # of the end-of-text tokens that fill a block after the first
POOLED = 4  # batches that are drawn together and sorted by length: less padding


@dataclass(frozen=True)
class Batch:
    """Inputs of one forward, and the loss on its positions (``weights`` 0 = not trained)."""

    ids: Tensor  # [B, T]
    positions: Tensor  # [B, T]
    visible: Tensor  # [B, 1, T, T] bool, True = the query (dim 2) sees the key (dim 3)
    targets: Tensor  # [B, T]
    weights: Tensor  # [B, T]
    task: Tensor  # [B] index into TASKS

    def to(self, device: str) -> Batch:
        return Batch(*(value.to(device) for value in vars(self).values()))


@lru_cache(maxsize=2)
def _pool(
    seed: int, pool: int, size: int, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Example], ...]:
    """``POOLED`` batches in a random order; tasks take turns."""
    rng = random.Random(f"train/{seed}/{pool}")
    names = tuple(TASKS)
    made = [draw(rng, names[i % len(names)], tokenizer) for i in range(POOLED * size)]
    made.sort(key=lambda example: len(tokenizer.encode(example.prompt)))
    order = list(range(POOLED))
    rng.shuffle(order)
    return tuple(made[place * size :][:size] for place in order)


def drawn(seed: int, step: int, size: int, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """The examples of a step."""
    pool, index = divmod(step, POOLED)
    return _pool(seed, pool, size, tokenizer)[index]


def noise(rows: int, blocks: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """What two copies mask, ``[rows, blocks * length]``, drawn for each block on its own.

    60 %: a ratio t, uniform, and the complement. 15 %: all, and a ratio. 25 %: all from a cut on,
    as decoding from the left meets them, for each copy.
    """
    shape = (rows, blocks, 1)
    kind = torch.rand(shape, generator=generator)
    ratio = torch.rand(shape, generator=generator)
    random_part = torch.rand(rows, blocks, length, generator=generator) < ratio
    place = torch.arange(length)
    cuts = [place >= torch.randint(length, shape, generator=generator) for _ in range(2)]
    every = torch.ones_like(random_part)
    first = torch.where(kind < 0.15, every, torch.where(kind < 0.4, cuts[0], random_part))
    second = torch.where(kind < 0.15, random_part, torch.where(kind < 0.4, cuts[1], ~random_part))
    return first.flatten(1), second.flatten(1)


def diffusion(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    block: int,
    generator: torch.Generator,
) -> Batch:
    """The layout above, of blocks of ``block`` tokens."""
    eos, mask = tokenizer.eos_token_id, tokenizer.mask_token_id
    prompts = [tokenizer.encode(example.prompt) for example in examples]
    answers = [[*tokenizer.encode(example.answer), eos] for example in examples]
    blocks = -(-max(map(len, answers)) // block)
    length = blocks * block
    width = -(-max(map(len, prompts)) // 4) * 4
    prompt = torch.tensor([[eos] * (width - len(p)) + p for p in prompts])
    real = torch.arange(width) >= width - torch.tensor([[len(p)] for p in prompts])
    answer = torch.tensor([a + [eos] * (length - len(a)) for a in answers])
    ends = torch.tensor([[len(a)] for a in answers])
    weight = torch.where(torch.arange(length) < ends, 1.0, FILL_WEIGHT)
    first, second = noise(len(answers), blocks, block, generator)
    clean = length - block
    ids = [prompt, answer[:, :clean], *(answer.masked_fill(m, mask) for m in (first, second))]
    targets = [prompt, answer[:, :clean], answer, answer]
    none = torch.zeros(len(answers), width + clean)
    after = ends.new_tensor([[len(p)] for p in prompts]) + torch.arange(length)
    before = (torch.arange(width) - width + ends.new_tensor([[len(p)] for p in prompts])).clamp(0)
    names = list(TASKS)
    return Batch(
        torch.cat(ids, 1),
        torch.cat([before, after[:, :clean], after, after], 1),
        visible(real, length, block)[:, None],
        torch.cat(targets, 1),
        torch.cat([none, weight * first, weight * second], 1),
        torch.tensor([names.index(example.task) for example in examples]),
    )


def visible(real: Tensor, length: int, block: int) -> Tensor:
    """Which query sees which key, ``[B, T, T]``; ``real`` ``[B, P]``: no padding."""
    width, clean = real.shape[1], length - block
    number = torch.arange(length) // block + 1  # of a token's block; the prompt is block 0
    of = torch.cat([torch.zeros(width, dtype=torch.int64), number[:clean], number, number])
    copy = torch.cat([torch.zeros(width + clean), torch.ones(length), torch.full((length,), 2.0)])
    clean_key = (copy == 0)[None, :]
    earlier = of[None, :] < of[:, None]
    same = (of[None, :] == of[:, None]) & (copy[None, :] == copy[:, None])
    seen = (clean_key & earlier) | same
    keys = torch.cat([real, real.new_ones(len(real), len(of) - width)], 1)
    own = torch.eye(len(of), dtype=torch.bool)  # padding sees itself, or its softmax is empty
    return (seen[None] & keys[:, None, :]) | own
