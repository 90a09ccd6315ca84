"""Training batches of the three stages, each a pure function of (seed, step).

A batch holds examples of all tasks and of one rough size, so that little of it is padding.
Everything is padded on the left; position ids count real tokens from 0.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from language import BLOCK_LENGTH
from tasks import TASKS, Example
from torch import Tensor
from transformers import PreTrainedTokenizerFast

PROMPT_WEIGHT = 0.05  # autoregressive stage: loss weight of a prompt token
FILL_WEIGHT = 0.1  # adaptation: loss weight of the EOS tokens that fill a block after the first


@dataclass(frozen=True)
class Batch:
    """Inputs of one forward, and the loss on its positions (`weights` 0 = not trained)."""

    ids: Tensor  # [B, T]
    positions: Tensor  # [B, T]
    visible: Tensor  # [B, 1, T, T] bool, True = the query (dim 2) sees the key (dim 3)
    targets: Tensor  # [B, T]
    weights: Tensor  # [B, T]
    task: Tensor  # [B] index into TASKS


def draw(
    name: str,
    count: int,
    sizes: tuple[float, float],
    mix: Sequence[float],
    easiest: Sequence[float],
) -> list[Example]:
    """`count` examples of similar length, all lengths within `sizes` (0..1) equally frequent.

    `name` seeds the draw; `mix` weighs the tasks and `easiest` is what size 0 means for them, in
    the order of TASKS.
    """
    rng = random.Random(name)
    centre = rng.uniform(sizes[0] - 0.05, sizes[1] + 0.05)
    drawn = []
    for _ in range(count):
        (task,) = rng.choices(TASKS, mix) if len(set(mix)) > 1 else (rng.choice(TASKS),)
        size = min(1.0, max(0.0, centre + rng.uniform(-0.1, 0.1)))
        start = easiest[TASKS.index(task)]
        drawn.append(task.example(rng, start + (1.0 - start) * size))
    return drawn


def _tasks(examples: Sequence[Example]) -> Tensor:
    names = [task.name for task in TASKS]
    return torch.tensor([names.index(example.task) for example in examples])


def _left_pad(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Ids [B, S] and the mask of real tokens [B, S]; S is rounded up to a multiple of 8."""
    width = -(-max(map(len, rows)) // 8) * 8
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows])
    real = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows])
    return ids, real


def autoregressive(examples: Sequence[Example], tokenizer: PreTrainedTokenizerFast) -> Batch:
    """prompt answer EOS, causal mask, next-token targets."""
    prompts = [tokenizer.encode(example.prompt) for example in examples]
    answers = [[*tokenizer.encode(e.answer), tokenizer.eos_token_id] for e in examples]
    ids, real = _left_pad(
        [p + a for p, a in zip(prompts, answers, strict=True)], tokenizer.pad_token_id
    )
    length = ids.shape[1]
    in_answer = torch.arange(length) >= length - torch.tensor([[len(a)] for a in answers])
    weights = torch.where(in_answer, 1.0, PROMPT_WEIGHT) * real
    weights = torch.cat([weights[:, 1:] * real[:, :-1], torch.zeros(len(ids), 1)], 1)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    own = torch.eye(length, dtype=torch.bool)  # padding sees itself, or its softmax is empty
    visible = (causal & real[:, None, :]) | own
    return Batch(
        ids, _positions(real), visible[:, None], ids.roll(-1, 1), weights, _tasks(examples)
    )


def _positions(real: Tensor) -> Tensor:
    return (real.cumsum(1) - 1).clamp(min=0)


def pointwise(examples: Sequence[Example], tokenizer: PreTrainedTokenizerFast) -> Batch:
    """[prompt | clean answer | one mask per answer token]: block diffusion with blocks of one.

    The prompt sees the whole prompt, the clean answer is causal, each mask sees the clean tokens
    before its position and itself. Every target is determined, and is read where its mask stands.
    """
    prompts = [tokenizer.encode(example.prompt) for example in examples]
    answers = [[*tokenizer.encode(e.answer), tokenizer.eos_token_id] for e in examples]
    pad = tokenizer.pad_token_id
    ids, real = _left_pad([p + a for p, a in zip(prompts, answers, strict=True)], pad)
    kinds = [
        [0] * len(p) + list(range(1, len(a) + 1)) for p, a in zip(prompts, answers, strict=True)
    ]
    order, _ = _left_pad(kinds, 0)
    rows, clean = ids.shape
    tail = max(map(len, answers))
    own_order, target, masked = order[:, -tail:], ids[:, -tail:], order[:, -tail:] > 0
    length = clean + tail
    visible = torch.zeros(rows, length, length, dtype=torch.bool)
    visible[:, :clean, :clean] = order[:, :, None] >= order[:, None, :]
    visible[:, clean:, :clean] = own_order[:, :, None] > order[:, None, :]
    visible[:, :, :clean] &= real[:, None, :]
    visible |= torch.eye(length, dtype=torch.bool)
    positions = _positions(real)
    return Batch(
        torch.cat([ids, torch.full_like(target, tokenizer.mask_token_id)], 1),
        torch.cat([positions, positions[:, -tail:]], 1),
        visible[:, None],
        torch.cat([ids, target], 1),
        torch.cat([torch.zeros(rows, clean), masked.float()], 1),
        _tasks(examples),
    )


def noise(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Which positions of a block are masked, True = masked; every row masks at least one.

    A third of the rows: each position with one ratio per row. A third: all positions from a cut
    on, as decoding from left to right meets them. A third: from a cut on, with one ratio per row.
    """
    rows, length = shape
    kind = torch.randint(3, (rows, 1), generator=generator)
    cut = torch.randint(length, (rows, 1), generator=generator)
    ratio = torch.rand(rows, 1, generator=generator)
    hit = torch.rand(rows, length, generator=generator) < ratio
    right = torch.arange(length) >= cut
    masked = torch.where(kind == 0, hit, torch.where(kind == 1, right, right & hit))
    return masked | (~masked.any(1, keepdim=True) & (torch.arange(length) == cut))


def diffusion(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerFast,
    generator: torch.Generator,
    copies: int,
) -> Batch:
    """[prompt | clean blocks | the next block noised] with `copies` noised versions of the block.

    The prompt sees the whole prompt; a clean block sees the prompt, the blocks before and itself;
    each noised copy sees all of that and itself, never another copy.
    """
    eos, mask_id = tokenizer.eos_token_id, tokenizer.mask_token_id
    prefixes, blocks, kinds = [], [], []
    for example in examples:
        prompt = tokenizer.encode(example.prompt)
        answer = [*tokenizer.encode(example.answer), eos]
        count = -(-len(answer) // BLOCK_LENGTH)
        answer += [eos] * (count * BLOCK_LENGTH - len(answer))
        start = BLOCK_LENGTH * int(torch.randint(count, (), generator=generator))
        prefixes.append(prompt + answer[:start])
        blocks.append(answer[start : start + BLOCK_LENGTH])
        kinds.append([0] * len(prompt) + [1 + i // BLOCK_LENGTH for i in range(start)])
    ids, real = _left_pad(prefixes, tokenizer.pad_token_id)
    order, _ = _left_pad(kinds, 0)  # 0 = prompt, n = the n-th clean block
    block = torch.tensor(blocks)
    rows, history = ids.shape
    noised, masks = [], []
    for _ in range(copies):
        masked = noise((rows, BLOCK_LENGTH), generator)
        noised.append(block.masked_fill(masked, mask_id))
        masks.append(masked)
    length = history + copies * BLOCK_LENGTH
    visible = torch.zeros(rows, length, length, dtype=torch.bool)
    visible[:, :history, :history] = order[:, :, None] >= order[:, None, :]
    visible[:, history:, :history] = True
    visible[:, :, :history] &= real[:, None, :]
    copy = torch.arange(copies * BLOCK_LENGTH) // BLOCK_LENGTH
    visible[:, history:, history:] = copy[:, None] == copy[None, :]
    visible |= torch.eye(length, dtype=torch.bool)
    first = real.sum(1, keepdim=True) + torch.arange(BLOCK_LENGTH)
    value = torch.where((block == eos) & (block.roll(1, 1) == eos), FILL_WEIGHT, 1.0)
    value[:, 0] = 1.0
    still = torch.zeros(rows, history)
    return Batch(
        torch.cat([ids, *noised], 1),
        torch.cat([_positions(real), *[first] * copies], 1),
        visible[:, None],
        torch.cat([ids, *[block] * copies], 1),
        torch.cat([still, *[value * masked for masked in masks]], 1),
        _tasks(examples),
    )
