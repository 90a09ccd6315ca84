"""Stage ``compile``: wall time to the end of the second block, compilation counted.

Every cell is a process of its own; "cold" begins with an empty cache, "warm" with what the cold one
left. Weights are made, and the device is awake, before the clock starts.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.compile_time import blocks
from benchmarks.contest import now
from benchmarks.gpu.generation import Bench, compiled
from benchmarks.gpu.plan import Cell, Plan, caches

__all__ = ["cells", "measure"]

CONTESTANTS = ("focus", "inductor")
BATCH, PROMPT = 4, 24


def cells(plan: Plan) -> list[Cell]:
    """Cold before warm, which needs what cold leaves."""
    out = []
    for model in plan.models:
        for name in plan.contestants or CONTESTANTS:
            folder = Path(plan.cache) / "compile" / f"{model}-{name}"
            for state in ("cold", "warm"):
                key = f"{model}: {name}, {state}"
                what = {"model": model, "contestant": name, "state": state, "cache": str(folder)}
                out.append(Cell(key, key, what, caches(folder)))
    return out


def measure(plan: Plan) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """What compiles and generates, once in a process."""

    def of(what: Mapping[str, Any]) -> dict[str, Any]:
        folder = Path(what["cache"])
        if what["state"] == "cold":
            shutil.rmtree(folder, ignore_errors=True)
        elif not folder.exists() and plan.inductor:
            raise FileNotFoundError(f"{folder}: the cold cell left no cache; it runs first")
        bench = Bench(plan, what["model"])
        ids = torch.randint(0, bench.mask, (BATCH, PROMPT), device=plan.device)
        made = compiled(what["contestant"], bench.model, bench.mask, plan.inductor)
        now()
        seconds = blocks(made, ids, bench.mask)
        captures = int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        return {**what, "dtype": str(bench.dtype), "inductor": plan.inductor,
                "seconds_to_block_2": seconds, "captures": captures}  # fmt: skip

    return of
