"""Decode order and importance deltas of the trained model, to be replayed on random weights.

Random weights decode in random order, which trained models do not. So the independent eager FOCUS
of the tests decodes real prompts with the trained model, and every model under test is made to
select by the same deltas and to decode the same positions in the same steps. What FOCUS computes
to find its own deltas is still computed, and then replaced.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, Qwen3ForCausalLM

from benchmarks.shapes import ALIGNED
from focus_compile import Candidates, Signal, Step
from tests.reference.generation import Decoding, generate_row
from tests.reference.state import Config

sys.path.insert(0, str(ALIGNED.parent))
from tasks import Example, examples

__all__ = [
    "Line",
    "Replay",
    "Trace",
    "TraceStep",
    "assemble",
    "prompts",
    "record",
    "record_rows",
    "trained",
]

BLOCK = 32


@dataclass(frozen=True)
class TraceStep:
    """One denoising step of a batch; tensors ``[B, T]``.

    ``delta`` fp32, 0 where a row has no masks left; ``decoded`` bool; ``retained`` bool, what the
    eager FOCUS retained; ``fed`` int, the tokens that it fed.
    """

    delta: Tensor
    decoded: Tensor
    retained: Tensor
    fed: int


@dataclass(frozen=True)
class Trace:
    """Steps of a batch over all its blocks, in lockstep: a row that is done waits."""

    steps: tuple[TraceStep, ...]

    @property
    def fed_fraction(self) -> float:
        canvas = sum(step.delta.numel() for step in self.steps)
        return sum(step.fed for step in self.steps) / canvas

    @property
    def retained_fraction(self) -> float:
        canvas = sum(step.delta.numel() for step in self.steps)
        return sum(int(step.retained.sum()) for step in self.steps) / canvas

    def to(self, device: str) -> Trace:
        """The same on a device: what is replayed there is copied once."""
        return Trace(
            tuple(
                TraceStep(step.delta.to(device), step.decoded.to(device), step.retained, step.fed)
                for step in self.steps
            )
        )


def trained(folder: Path = ALIGNED) -> tuple[Qwen3ForCausalLM, Any]:
    """A checkpoint, the aligned one unless told otherwise, and its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return Qwen3ForCausalLM.from_pretrained(folder).eval(), tokenizer


def prompts(task: str, count: int) -> list[Example]:
    """The first examples of a task, seed 1."""
    return examples(task, count, 1)


def record(task: str, batch: int, *, blocks: int = 1) -> Trace:
    """Decode prompts of a task, at confidence 0.9, with the eager FOCUS of the tests.

    Prompts are the first ones of seed 1 whose answers fill the first ``blocks`` blocks.
    """
    return assemble(record_rows(task, batch, blocks=blocks))


Line = tuple[Tensor, Tensor, Tensor, int]
"""One step of one row: delta, decoded and retained ``[T]``, how many tokens were fed."""


def record_rows(task: str, count: int, *, blocks: int = 1) -> list[list[list[Line]]]:
    """As :func:`record`, the steps of each row by block, before rows are put side by side."""
    model, tokenizer = trained()
    drawn = [
        e for e in prompts(task, 20 * count) if len(tokenizer.encode(e.answer)) > blocks * BLOCK
    ]
    if len(drawn) < count:
        raise ValueError(f"{task}: only {len(drawn)} of {count} prompts have long answers")
    return [_row(model, tokenizer, e.prompt, blocks) for e in drawn[:count]]


def assemble(rows: Sequence[list[list[Line]]]) -> Trace:
    """Rows side by side, in lockstep: one that is done with a block waits for the others."""
    steps: list[TraceStep] = []
    for block in range(len(rows[0])):
        number = max(len(row[block]) for row in rows)
        for index in range(number):
            lines = [row[block][index] if index < len(row[block]) else _IDLE for row in rows]
            delta, decoded, retained = (
                torch.stack([line[part] for line in lines]) for part in range(3)
            )
            fed = sum(line[3] for line in lines)
            steps.append(TraceStep(delta, decoded, retained, fed))
    return Trace(tuple(steps))


_NONE = torch.zeros(BLOCK, dtype=torch.bool)
_IDLE: Line = (torch.zeros(BLOCK), _NONE, _NONE, 0)


def _row(model: Qwen3ForCausalLM, tokenizer: Any, prompt: str, blocks: int) -> list[list[Line]]:
    """Steps of one row, block by block."""
    deltas: list[Tensor] = []

    def listen(importance0: Tensor, importance1: Tensor, masked: list[int]) -> Tensor:
        delta = importance1 - importance0
        deltas.append(torch.zeros(BLOCK).index_put((torch.tensor(masked),), delta.float()))
        return delta

    made = generate_row(
        model,
        tokenizer.encode(prompt),
        blocks=blocks,
        block_length=BLOCK,
        mask_id=tokenizer.mask_token_id,
        config=Config(),
        decoding=Decoding(confidence_threshold=0.9, ban_mask_token=True),
        signal=listen,
    )
    out: list[list[Line]] = [[] for _ in range(blocks)]
    for step, delta in zip(made.steps, deltas, strict=True):
        decoded = _NONE.index_fill(0, torch.tensor(list(step.decoded)), True)
        retained = torch.tensor(step.retain_mask)
        out[step.block].append((delta, decoded, retained, len(step.fed)))
    return out


class Replay:
    """Replays a trace in one generation: give ``signal`` to the session, ``choose`` to generate."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.index = 0

    def signal(self, step: Step) -> Signal:
        return Signal((0.0, 0.0), self.trace.steps[self.index].delta)

    def choose(self, candidates: Candidates, where: Tensor) -> Tensor:
        decoded = self.trace.steps[self.index].decoded
        self.index += 1
        return decoded.to(where.device)
