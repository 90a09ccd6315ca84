"""A short soak: caches are full when everything was seen once, and memory stays where it is.

The long one is ``python -m benchmarks.soak``; what it found is in docs/reliability.md.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

from torch._dynamo.utils import counters

from benchmarks.soak import MASK, census, soak
from docs import reliability
from focus_compile import focus_backend
from tests.support.harness import PAPER, eager_inner

GENERATIONS = 150
FREELY = 30_000
"""Bytes per generation: a leaked session of these sizes holds more."""


def backend(gm: Any, inputs: Any) -> Callable[..., Any]:
    options = {"mask_token_id": MASK, "strict": True, **PAPER}
    return focus_backend(gm, inputs, options=options, inner=eager_inner)


def test_nothing_grows() -> None:
    counters.clear()
    gc.collect()
    before = census()
    report = soak(GENERATIONS, backend, prompts=range(2, 25))
    assert report["interrupted"] == GENERATIONS / 10
    # one row or more, prompt or block: nothing else makes Dynamo capture the model again
    assert report["end"]["captured_graphs"] == 4
    for name in ("sessions", "block_states"):
        assert report["warm"][name] == report["end"][name] == before[name]
    for name in ("programs", "tensors", "warnings_remembered"):
        assert report["warm"][name] == report["end"][name]
    assert report["slope_bytes"] - 3 * report["slope_error_bytes"] < FREELY
    about = {"python": "", "torch": "", "transformers": "", "machine": "", "threads": 1}
    about |= {"commit": "", "recompile_limit": 8, "batches": (1, 6), "prompts": (1, 24)}
    assert "bytes per generation" in reliability.soak(report | about | {"blocks": (1, 3)})
