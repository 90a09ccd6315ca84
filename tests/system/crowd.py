"""One process of the crowd test: threads that call a model nobody has compiled yet.

Every thread is a request of its own, in a session of its own, with its own prompt and budget; some
share their sizes. Prints a JSON object: what differed from the eager FOCUS of
tests/reference. tests/system/test_crowd.py runs two such processes over one cache of Inductor's.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._inductor.compile_fx import compile_fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule

import focus_compile
from focus_compile.programs.program import Inner
from tests.reference.emulation import Emulated, Emulation
from tests.reference.state import Config
from tests.support.harness import (
    MASK,
    Call,
    Run,
    Sizes,
    build_model,
    computed,
    eager_inner,
    eager_logits,
    retained,
)

STEPS, TOKENS = 5, 7


@dataclass
class Request:
    """A prompt's keys and values, and what the eager FOCUS makes of each step of its block."""

    seed: int
    calls: list[Call] = field(default_factory=list)
    expected: list[Emulated] = field(default_factory=list)

    @property
    def config(self) -> Config:
        return Config(1.0 + self.seed % 3 / 4, ("written", "prefix")[self.seed % 2])


@torch.no_grad()
def prepare(run: Run, seed: int) -> Request:
    """Decode the leftmost two retained tokens of every row, at every step."""
    request, batch, history = Request(seed), 2 + seed % 3, 5 + seed % 4
    config = run.model.config
    past = [
        tuple(
            _random(seed, n, batch, config.num_key_value_heads, history, config.head_dim)
            for n in (2 * layer, 2 * layer + 1)
        )
        for layer in range(config.num_hidden_layers)
    ]
    ids = torch.full((batch, TOKENS), MASK)
    emulation = Emulation(request.config)
    visible = torch.ones(batch, TOKENS, history + TOKENS, dtype=torch.bool)
    positions = (history + torch.arange(TOKENS)).expand(batch, TOKENS)
    for _ in range(STEPS):
        call = Call(ids, ids == MASK, positions, visible, past)  # type: ignore[arg-type]
        if not call.masked.any():
            break
        found = emulation.step(lambda c=call: eager_logits(run.model, c), ids, call.masked, history)
        request.calls.append(call)
        request.expected.append(found)
        chosen = found.retained & call.masked
        chosen &= chosen.cumsum(1) <= 2
        for row, count in zip(emulation.rows, chosen.sum(1).tolist(), strict=True):
            row.record(count)
        ids = ids.masked_fill(chosen, 3 + seed)
    return request


def _random(seed: int, turn: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 * seed + turn))


def _many_graphs() -> AbstractContextManager[None]:
    """Dynamo's configuration is a thread's own, and every thread that waits compiles anew."""
    found: AbstractContextManager[None] = torch._dynamo.config.patch(
        recompile_limit=64, fail_on_recompile_limit_hit=True
    )
    return found


@torch.no_grad()
def serve(run: Run, request: Request, start: threading.Barrier) -> list[str]:
    """Run a request's steps; what was wrong with them."""
    wrong: list[str] = []
    start.wait()
    config = request.config
    with (
        _many_graphs(),
        focus_compile.session(alpha=config.alpha, visibility=config.visibility) as focus,
    ):
        for step, (call, found) in enumerate(zip(request.calls, request.expected, strict=True)):
            logits = run.compiled(**call.kwargs(run.model)).logits
            kept = retained(logits)
            error = (
                (computed(logits) - found.logits * found.retained.unsqueeze(-1)).abs().max().item()
            )
            if found.margin > 1e-5 and (not torch.equal(kept, found.retained) or error > 1e-4):
                wrong.append(f"request {request.seed}, step {step}: error {error}")
            if focus.stats.fed_per_step[-1] != int(found.fed.sum()):
                wrong.append(f"request {request.seed}, step {step}: fed other tokens")
    return wrong


def crowd(run: Run, threads: int) -> dict[str, object]:
    """Requests at once, prepared one after the other."""
    requests = [prepare(run, seed) for seed in range(threads)]
    start = threading.Barrier(threads)
    with ThreadPoolExecutor(threads) as pool:
        wrong = list(pool.map(lambda request: serve(run, request, start), requests))
    steps = [found for request in requests for found in request.expected]
    return {
        "wrong": [told for request in wrong for told in request],
        "steps": len(steps),
        "evicting": sum(bool((found.fed & ~found.retained).any()) for found in steps),
        "thrifty": sum(bool((~found.fed).any()) for found in steps),
    }


def halves_only(gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """Inductor for prefix and suffix, nothing for the dense program."""
    if not any(isinstance(value, FakeTensor) for value in inputs):
        return gm
    compiled: Any = compile_fx(gm, inputs)
    return compiled  # type: ignore[no-any-return]


def model_of_crowd(inner: Inner = eager_inner) -> Run:
    """The smallest that FOCUS applies to."""
    model = build_model(Sizes(layers=2, heads=2, groups=1, head_dim=8, hidden=16, intermediate=24))
    return Run(model, dynamic=True, inner=inner)


def main() -> None:
    torch.set_num_threads(1)
    json.dump(crowd(model_of_crowd(halves_only), 2), sys.stdout)


if __name__ == "__main__":
    main()
