"""The process of a lane: a cell on each line of its input, what came of it on each of its output.

    python -m benchmarks.gpu.worker PLAN

An exception of any kind is a result: the cell's, not the stage's.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks.gpu import compile as compile_stage
from benchmarks.gpu import profile as profile_stage
from benchmarks.gpu import steps as steps_stage
from benchmarks.gpu.lanes import TAIL
from benchmarks.gpu.machine import machine
from benchmarks.gpu.plan import Plan

__all__ = ["answer", "measures"]

Measure = Callable[[Mapping[str, Any]], dict[str, Any]]


def measures(plan: Plan) -> Measure:
    """The function that measures a cell of the plan's stage."""
    stages: dict[str, Callable[[Plan], Measure]] = {
        "steps": steps_stage.measure,
        "profile": profile_stage.measure,
        "compile": compile_stage.measure,
    }
    return stages[plan.stage](plan)


def answer(measure: Measure, what: Mapping[str, Any]) -> dict[str, Any]:
    """``ok`` and the cell's figures, or what went wrong."""
    try:
        return {"outcome": "ok", **measure(what)}
    except torch.OutOfMemoryError as error:
        return {"outcome": "out of memory", "error": str(error)}
    except Exception:  # noqa: BLE001
        return {"outcome": "error", "error": traceback.format_exc()[-TAIL:]}


def main() -> None:
    """Serve until the input ends."""
    # compilers and kernels may print: what is written to descriptor 1 goes to the log
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    plan = Plan.loads(sys.argv[1])
    if plan.device == "cpu":
        torch.set_num_threads(1)
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    measure, told = measures(plan), machine(plan)
    for line in sys.stdin:
        found = answer(measure, json.loads(line))
        answers.write(json.dumps(found | {"machine": told}) + "\n")


if __name__ == "__main__":
    main()
