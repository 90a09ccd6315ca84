"""Contestants of a benchmark, and the work that each of them does: a generation, timed."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters

import focus_compile
from benchmarks.shapes import ALIGNED, build
from benchmarks.trace import BLOCK, Replay, Trace, prompts, record, trained

__all__ = [
    "PAPER",
    "Contestant",
    "Run",
    "Timed",
    "Work",
    "answering",
    "compiles",
    "contestants",
    "now",
    "prepare",
    "spread",
]

PROMPT = 64
"""Tokens of a prompt of random ids."""
PAPER: Mapping[str, Any] = {"first_step": "evict", "rescue": None}
"""A session that does what the paper does: no first step is open, and nobody is rescued."""


def now() -> float:
    """Seconds, once everything that was launched is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def compiles() -> int:
    """Graphs that Dynamo captured and programs that AOTAutograd was asked for so far."""
    cache = counters["aot_autograd"]
    return int(
        counters["stats"]["unique_graphs"]
        + cache["autograd_cache_miss"]
        + cache["autograd_cache_hit"]
    )


def spread(ratios: Sequence[float]) -> dict[str, float]:
    """Of the pairs of one row."""
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


@dataclass
class Run:
    """Seconds of one generation from the end of its prefill on, and of every forward after it."""

    seconds: float
    forwards: list[float]
    result: focus_compile.Generated
    texts: list[str] = field(default_factory=list)

    @property
    def steps_per_block(self) -> list[int]:
        """Denoising forwards of each block; a commit follows them."""
        return [int(rows.max()) for rows in self.result.steps_per_block]

    @property
    def commits(self) -> list[float]:
        ends = itertools.accumulate(number + 1 for number in self.steps_per_block)
        return [self.forwards[end - 1] for end in ends]

    @property
    def steps(self) -> float:
        return sum(self.forwards) - sum(self.commits)


@dataclass
class Timed:
    """A model that notes when each of its forwards began and ended, GPU included."""

    model: Any
    times: list[tuple[float, float]] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, **kwargs: Any) -> Any:
        start = now()
        out = self.model(**kwargs)
        self.times.append((start, now()))
        return out


@dataclass(frozen=True)
class Contestant:
    """A callable model, the session that it runs in, and whether FOCUS must run in every step.

    A session evicts in first steps and rescues nobody, as the paper, unless it says otherwise.
    """

    model: Any
    scope: Mapping[str, Any] = field(default_factory=dict)
    focus: bool = True


@dataclass(frozen=True)
class Work:
    """What every contestant generates.

    ``arguments`` are those of ``generate``; ``trace`` is replayed; ``tokenizer`` and ``answers``
    of the trained model tell how many texts are right.
    """

    ids: Tensor
    mask: int
    arguments: dict[str, Any]
    trace: Trace | None = None
    tokenizer: Any = None
    answers: tuple[str, ...] = ()

    def run(self, contestant: Contestant, timer: Callable[[Any], Timed] = Timed) -> Run:
        timed = timer(contestant.model)
        arguments, signal = {"max_new_tokens": BLOCK} | self.arguments, None
        if self.trace is not None:
            replay = Replay(self.trace)
            arguments["remasking_strategy"], signal = replay.choose, replay.signal
        with focus_compile.session(**PAPER | {"signal": signal} | contestant.scope):
            result = focus_compile.generate(
                timed,  # type: ignore[arg-type]
                self.ids,
                block_length=BLOCK,
                mask_token_id=self.mask,
                return_dict=True,
                **arguments,
            )
            end = now()
        seconds = [stop - start for start, stop in timed.times]
        run = Run(end - timed.times[0][1], seconds[1:], result)
        if self.tokenizer is not None:
            made = result.sequences[:, self.ids.shape[1] :]
            run.texts = self.tokenizer.batch_decode(made, skip_special_tokens=True)
        return run

    def exact_match(self, run: Run) -> float | None:
        """Share of right answers, where there is a right one."""
        if not self.answers:
            return None
        right = [a == b for a, b in zip(run.texts, self.answers, strict=True)]
        return sum(right) / len(right)


def contestants(model: Any, mask: int, names: Sequence[str]) -> dict[str, Contestant]:
    def focus(**options: Any) -> Any:
        options |= {"mask_token_id": mask, "strict": True}
        return torch.compile(model, backend="focus", dynamic=True, options=options)

    ours = focus()
    makers: dict[str, Callable[[], Contestant]] = {
        "eager": lambda: Contestant(model, focus=False),
        "inductor": lambda: Contestant(torch.compile(model, dynamic=True), focus=False),
        "focus": lambda: Contestant(ours),
        "focus, no delayed cache": lambda: Contestant(focus(delayed_cache=False)),
        "focus, no stale K/V": lambda: Contestant(focus(stale_kv=False)),
        "focus, nothing evicted": lambda: Contestant(ours, {"alpha": 1e9}),
        "focus, disabled": lambda: Contestant(ours, {"enabled": False}, focus=False),
    }
    return {name: makers[name]() for name in names}


def prepare(
    shape: str,
    batch: int,
    strategy: str,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[Any, Work]:
    """A model, and what it has to generate; the trained one is fp32 on the CPU."""
    kind, _, what = strategy.partition(":")
    if shape == "tiny":
        return answering(what, batch)
    model = build(shape, device, dtype)
    mask = model.config.vocab_size - 1
    ids = torch.randint(0, mask, (batch, PROMPT), generator=torch.Generator().manual_seed(1))
    ids = ids.to(device)
    if kind == "trace":
        return model, Work(ids, mask, {}, record(what, batch))
    return model, Work(ids, mask, {"remasking_strategy": kind, "tokens_per_step": int(what)})


def answering(task: str, batch: int, folder: Path = ALIGNED) -> tuple[Any, Work]:
    """A trained model on prompts of a task, decoded by confidence 0.9 to their ends."""
    model, tokenizer = trained(folder)
    drawn = prompts(task, batch)
    given = tokenizer(
        [example.prompt for example in drawn],
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )
    arguments = {
        "attention_mask": given["attention_mask"],
        "max_new_tokens": 3 * BLOCK,
        "eos_token_id": tokenizer.eos_token_id,
    }
    answers = tuple(example.answer for example in drawn)
    mask = tokenizer.mask_token_id
    return model, Work(given["input_ids"], mask, arguments, None, tokenizer, answers)
