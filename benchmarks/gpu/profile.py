"""Stage ``profile``: where a denoising step's time goes by kind of work, dense beside FOCUS."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.gpu.generation import Bench, profiled
from benchmarks.gpu.plan import Cell, Plan
from benchmarks.gpu.steps import lanes
from benchmarks.gpu.timeline import Timeline

__all__ = ["cells", "measure"]

CONTESTANTS = ("inductor", "focus", "focus, graphs")


def cells(plan: Plan) -> list[Cell]:
    return lanes(plan, plan.contestants or CONTESTANTS)


def measure(plan: Plan) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """What profiles one generation, after those that compile and record."""
    bench = functools.cache(lambda name: Bench(plan, name))

    def of(what: Mapping[str, Any]) -> dict[str, Any]:
        chosen, name = bench(what["model"]), what["contestant"]
        run = chosen.runner(name, chosen.work(what["batch"]))
        chosen.warm(name, run)
        seen, events = profiled(run, plan.device)
        report = Timeline(events, seen.result.forwards).report()
        return {**what, "task": plan.task, "history": plan.history, "steps": seen.result.forwards,
                "dtype": str(chosen.dtype), "inductor": plan.inductor, **report}  # fmt: skip

    return of
