"""How often Inductor compiles: prefix and suffix once, whatever Dynamo captures anew."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor.compile_fx import compile_fx
from torch._inductor.utils import fresh_cache
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule
from transformers import DynamicCache

import focus_compile
from tests.support.harness import CACHE, MASK, Run, Sizes, build_model, random_call
from tests.support.paths import ROOT

BLOCKS, STEPS = 4, 3


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("history", [0, 17, None])
def test_dynamo_captures_one_graph(attention: str, history: int | None) -> None:
    model = build_model(Sizes(layers=3), attention)
    call = random_call(1, model, 3, 9, history, "float")
    told = torch._dynamo.explain(model)(**call.kwargs(model))
    assert (told.graph_count, told.graph_break_count) == (1, 0)


@dataclass
class Counted:
    """Inductor for prefix and suffix, nothing for the dense program; counts what is compiled.

    ``requests``: graphs to compile, by program. ``misses``: those that no cache had.
    """

    requests: list[str] = field(default_factory=list)
    misses: list[str] = field(default_factory=list)

    def __call__(self, gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        if not any(isinstance(value, FakeTensor) for value in inputs):
            return gm
        names = {node.name for node in gm.graph.nodes if node.op == "placeholder"}
        program = "suffix" if "tokens" in names else "prefix"
        before = counters["aot_autograd"]["autograd_cache_miss"]
        compiled: Any = compile_fx(gm, inputs)
        self.requests.append(program)
        missed = counters["aot_autograd"]["autograd_cache_miss"] - before
        self.misses += [program] * missed
        return compiled


@dataclass(frozen=True)
class Row:
    """A loop, and the programs that it has to compile after the loops above it."""

    batch: int
    prompt: int
    tokens: int
    compiles: list[str]


ONCE = ["prefix", "suffix"]
TABLE = {
    "three rows": Row(3, 17, 9, ONCE),
    "more rows, another history, another block length": Row(5, 24, 12, []),
    "one row": Row(1, 17, 9, ONCE),
    "no history at first": Row(3, 0, 9, ONCE * 2),
}


@torch.no_grad()
def denoise(run: Run, row: Row, focus: focus_compile.Session) -> list[int]:
    """A decoding loop: after each step the cache is cropped, at the end of a block it is not.

    Returns how many graphs Dynamo had captured after each block.
    """
    generator = torch.Generator().manual_seed(1)
    cache, captured, length = DynamicCache(config=run.model.config), list[int](), 0
    batch = row.batch

    def step(tokens: int, masked: int) -> None:
        ids = torch.randint(0, MASK, (batch, tokens), generator=generator)
        for b in range(batch):
            ids[b, torch.randperm(tokens, generator=generator)[: max(0, masked - b)]] = MASK
        keys = length + tokens
        focus.reset()  # ids are drawn anew
        run.compiled(
            input_ids=ids,
            attention_mask=torch.ones(batch, 1, tokens, keys, dtype=torch.bool),
            position_ids=torch.arange(length, keys).expand(batch, tokens),
            use_cache=True,
            **{CACHE: cache},
        )

    if row.prompt:
        step(row.prompt, 0)
        length = row.prompt
    for _ in range(BLOCKS):
        for left in range(STEPS):
            step(row.tokens, row.tokens - 2 * left)
            cache.crop(-row.tokens)
        step(row.tokens, 0)
        length += row.tokens
        captured.append(len(run.executables))
    return captured


def test_table_of_compiles() -> None:
    """Every loop captures its model anew, four times or so; the caches serve the rest."""
    inner = Counted()
    with fresh_cache():
        for name, row in TABLE.items():
            torch._dynamo.reset()
            run = Run(build_model(Sizes(layers=3)), inner=inner)
            requests, misses = len(inner.requests), len(inner.misses)
            with focus_compile.session(first_step="evict") as focus:
                captured = denoise(run, row, focus)
            assert captured[1] == captured[-1], name  # nothing new after the second block
            dense, prefix, suffix = run.counts()
            assert (prefix, suffix) == (BLOCKS * STEPS,) * 2, name
            assert dense == BLOCKS + bool(row.prompt), name
            assert set(inner.requests[requests:]) == set(ONCE), name
            assert inner.misses[misses:] == row.compiles, name


def test_the_cache_trap(tmp_path: Path) -> None:
    """Plain Inductor, FOCUS, another budget: right in one process, and in the next one."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    told = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-m", "tests.programs.cache_trap"],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        told.append(json.loads(done.stdout))
    for process in told:
        assert process["masked"] > 0
        assert process["plain"] <= 1e-5 and process["all"] <= 1e-5 and process["some"] <= 1e-4
        assert process["wrong"] == 0 and 0 < process["kept"] < 3 * 9
    # graphs compiled: plain and dense are one, prefix and suffix serve both budgets
    assert [(process["misses"], process["hits"]) for process in told] == [(3, 4), (0, 7)]
