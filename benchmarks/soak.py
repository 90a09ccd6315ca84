"""Thousands of generations in one process: does memory grow, do caches?

    python -m benchmarks.soak --out docs/soak.json
    python -m benchmarks.soak --quick

A tiny Qwen3 with random weights through Inductor. Every generation has another batch, prompt and
number of blocks; every tenth is interrupted by an exception in mid-block. Dynamo's recompile limit
is an error. Resident memory is sampled after a garbage collection, and after the allocator has
given back what is free.
"""

from __future__ import annotations

import gc
import json
import platform
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import transformers
import typer
from rich.progress import track
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor.codecache import PyCodeCache
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks.memory import resident
from benchmarks.provenance import commit, cpu
from focus_compile import Generated, Session, focus_backend, generate
from focus_compile.generation.decoding import Candidates
from focus_compile.log import text_once
from focus_compile.programs.program import Program
from focus_compile.runtime.block import BlockState

SIZES = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 16, "intermediate_size": 48, "vocab_size": 64,
}  # fmt: skip
MASK = 63
BATCHES, PROMPTS, BLOCKS, LENGTHS = range(1, 7), range(1, 25), range(1, 4), (4, 6, 8)
INTERRUPTED = 10
"""Every so many generations one is."""
SAMPLES = 100


class Interrupted(Exception):
    """What a server throws into a generation whose client has gone."""


def build() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**SIZES)).eval()


def one(model: Any, number: int, prompts: Sequence[int] = PROMPTS) -> Generated:
    """The n-th generation, with one of these lengths of prompts.

    Raises:
        Interrupted: in its second step, where it is one of those.
    """
    draw = random.Random(number)
    batch, prompt, length = draw.choice(BATCHES), draw.choice(prompts), draw.choice(LENGTHS)
    source = torch.Generator().manual_seed(number)
    ids = torch.randint(0, MASK, (batch, prompt), generator=source)
    starts = torch.randint(0, prompt, (batch, 1), generator=source)
    strategy: Any = _failing() if number % INTERRUPTED == INTERRUPTED - 1 else "fixed"
    made = generate(
        model,
        ids,
        (torch.arange(prompt) >= starts).long(),
        max_new_tokens=length * draw.choice(BLOCKS),
        block_length=length,
        mask_token_id=MASK,
        remasking_strategy=strategy,
        tokens_per_step=draw.choice((1, 2, 3)),
        return_dict=True,
    )
    assert made.focus_steps == made.forwards > 0, "a masked call ran no prefix and suffix"
    assert not bool((made.sequences == MASK).any())
    return made


def _failing() -> Callable[[Candidates, Tensor], Tensor]:
    calls = 0

    def strategy(_: Candidates, where: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise Interrupted
        return where & (where.cumsum(1) <= 1)

    return strategy


def census() -> dict[str, int]:
    """What lives, and what caches hold."""
    found = gc.get_objects()
    programs = [each for each in found if type(each) is Program]
    return {
        "sessions": sum(type(each) is Session for each in found),
        "block_states": sum(type(each) is BlockState for each in found),
        "tensors": sum(issubclass(type(each), Tensor) for each in found),
        "captured_graphs": counters["stats"]["unique_graphs"],
        "programs": len(programs),
        "compiled_programs": sum(each.compiled is not None for each in programs),
        "output_code_modules": len(PyCodeCache.modules),
        "warnings_remembered": text_once.cache_info().currsize,
    }


def slope(samples: list[tuple[int, int]]) -> tuple[float, float]:
    """Bytes per generation and the standard error of that, by least squares."""
    (inclination, _), covariance = np.polyfit(*zip(*samples, strict=True), 1, cov=True)
    return float(inclination), float(np.sqrt(covariance[0, 0]))


def soak(
    generations: int,
    backend: Any,
    warm: float = 0.25,
    half: float = 0.5,
    prompts: Sequence[int] = PROMPTS,
) -> dict[str, Any]:
    """Run. Censuses of caches are compared from the share ``warm`` on, memory from ``half`` on."""
    model = build()
    compiled = torch.compile(model, backend=backend, dynamic=True)
    samples: list[tuple[int, int]] = []
    counted: dict[int, dict[str, int]] = {}
    started, interrupted, steps, last_graph, graphs = time.perf_counter(), 0, 0, 0, 0
    every = max(5, generations // SAMPLES)
    for number in track(range(generations)):
        try:
            steps += one(compiled, number, prompts).forwards
        except Interrupted:
            interrupted += 1
        if counters["stats"]["unique_graphs"] != graphs:
            graphs, last_graph = counters["stats"]["unique_graphs"], number
        if number % every == every - 1:
            gc.collect()
            samples.append((number + 1, resident(trim=True)))
            if not counted and number >= warm * generations:
                counted[number + 1] = census()
    used = [sample for sample in samples if sample[0] >= half * generations]
    per_generation, error = slope(used)
    ((at, then),) = counted.items()
    return {
        "generations": generations,
        "interrupted": interrupted,
        "forwards": steps,
        "seconds": round(time.perf_counter() - started, 1),
        "last_capture": last_graph,
        "samples": samples,
        "used_from": used[0][0],
        "used": len(used),
        "slope_bytes": per_generation,
        "slope_error_bytes": error,
        "warm_at": at,
        "warm": then,
        "end": census(),
    }


def focus(gm: Any, inputs: Any) -> Any:
    """The backend as users have it; what it refuses is an error."""
    return focus_backend(gm, inputs, options={"mask_token_id": MASK, "strict": True})


def main(
    *,
    generations: int = 2000,
    threads: int = 1,
    out: Path | None = None,
    quick: Annotated[bool, typer.Option("--quick", help="100 generations")] = False,
) -> None:
    """Run through Inductor; print, and write, what was found."""
    torch.set_num_threads(threads)
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    report = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": cpu(),
        "threads": threads,
        "commit": commit(),
        "recompile_limit": torch._dynamo.config.recompile_limit,
        "sizes": SIZES,
        "batches": [min(BATCHES), max(BATCHES)],
        "prompts": [min(PROMPTS), max(PROMPTS)],
        "blocks": [min(BLOCKS), max(BLOCKS)],
        "block_lengths": list(LENGTHS),
        **soak(100 if quick else generations, focus),
    }
    print(json.dumps(report))
    if out is not None:
        out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
