"""Stage ``steps``: milliseconds per denoising step, tokens per second, launches, idle time, memory.

The contestants generate one block after a prompt of random ids, in the order that a trained model
decoded one in; tokens per second count the exact commit. FOCUS and Inductor come first, batch by
batch, then CUDA graphs, then the eager model. The device's roofs are measured by the first cell.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.contest import Run
from benchmarks.gpu.generation import CONTESTANTS, Bench, Invalid, compiles, profiled
from benchmarks.gpu.machine import roofs
from benchmarks.gpu.plan import Cell, Plan
from benchmarks.gpu.timeline import Timeline
from benchmarks.memory import sampled

__all__ = ["ROOFS", "cells", "key", "measure"]

ROOFS = "roofs"
LONG = 12.0
"""Seconds of timed generations after which two are enough."""


def key(model: str, batch: int, contestant: str) -> str:
    return f"{model}, batch {batch}: {contestant}"


def lanes(plan: Plan, contestants: tuple[str, ...]) -> list[Cell]:
    """A model's cells; what is captured is compiled once in a process, graphs hold memory."""
    alike = [name for name in contestants if name in ("focus", "inductor")]
    groups = [alike, *([name] for name in contestants if name not in alike)]
    return [
        Cell(
            key(model, batch, name),
            f"{model}: {', '.join(group)}",
            {"model": model, "batch": batch, "contestant": name},
        )
        for model in plan.models
        for group in groups
        for batch in plan.batches
        for name in group
    ]


def cells(plan: Plan) -> list[Cell]:
    made = lanes(plan, plan.contestants or CONTESTANTS)
    return [Cell(ROOFS, made[0].lane, {"contestant": ROOFS, "model": plan.models[0]}), *made]


def measure(plan: Plan) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """What measures a cell; models live as long as it does."""
    bench = functools.cache(lambda name: Bench(plan, name))

    def of(what: Mapping[str, Any]) -> dict[str, Any]:
        chosen = bench(what["model"])
        if what["contestant"] == ROOFS:
            return roofs(plan.device, chosen.dtype)
        return one(chosen, what["batch"], what["contestant"])

    return of


def one(bench: Bench, batch: int, name: str) -> dict[str, Any]:
    """Figures of a contestant."""
    plan = bench.plan
    work = bench.work(batch)
    run = bench.runner(name, work)
    start = time.perf_counter()
    warm = bench.warm(name, run)
    warmed = time.perf_counter() - start
    runs: list[Run] = []
    before = compiles()
    with sampled(plan.device) as peak:
        while len(runs) < plan.repeats and (len(runs) < 2 or sum(r.seconds for r in runs) < LONG):
            runs.append(run())
    if compiles() != before:
        raise Invalid(f"{name} compiled inside the timed region")
    seen, events = profiled(run, plan.device)
    profile = Timeline(events, seen.result.forwards).report()
    result = runs[0].result
    return {
        "model": bench.name,
        "batch": batch,
        "contestant": name,
        "history": plan.history,
        "task": plan.task,
        "dtype": str(bench.dtype),
        "inductor": plan.inductor,
        "warm_runs": warm,
        "warm_seconds": warmed,
        "runs": len(runs),
        **spread("tokens_per_s", [r.result.decoded / r.seconds for r in runs]),
        **spread("ms_per_step", [1e3 * r.steps / r.result.forwards for r in runs]),
        "ms_commit": 1e3 * statistics.median(statistics.mean(r.commits) for r in runs),
        "ms_outside": 1e3
        * statistics.median((r.seconds - sum(r.forwards)) / r.result.forwards for r in runs),
        "steps": result.forwards,
        "fed_per_step": result.fed_per_step,
        "retained_per_step": [int(mask.sum()) for mask in result.retain_masks],
        "peak_mib": peak.most,
        "before_mib": peak.before,
        "profile": {
            name: profile[name]
            for name in (
                *("ms_per_step", "kernels_per_step", "copies_per_step"),
                *("host_launches_per_step", "idle"),
            )
        },
    }


def spread(name: str, values: list[float]) -> dict[str, float]:
    """Median, least and largest."""
    ends = {f"{name}_min": min(values), f"{name}_max": max(values)}
    return {name: statistics.median(values), **ends}
