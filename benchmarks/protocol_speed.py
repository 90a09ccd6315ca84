"""Tokens per second of the protocol's best contestants, through Inductor, taking turns.

    python -m benchmarks.protocol_speed --out docs/protocol_speed.json
    python -m benchmarks.protocol_speed --quick

What rescue and an open first step cost in time: plain Inductor, the paper's way, rescue alone, the
defaults of ``generate``, and the leftmost masked tokens with an open first step and rescue. Both
tiny models, every task, one batch of prompts. The first turn compiles and is not counted; time runs
from the end of the prefill. Rows that the file holds are not measured again.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.progress import Progress
from torch._dynamo.utils import counters

from benchmarks.contest import Contestant, answering, compiles, spread
from benchmarks.protocol import MODELS, TINY
from benchmarks.provenance import commit, cpu

sys.path.insert(0, str(TINY))
from tasks import TASK_BY_NAME

SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "inductor": {},
    "the paper's way": {},
    "rescue": {"rescue": "auto"},
    "defaults": {"rescue": "auto", "first_step": None},
    "position, open": {"rescue": "auto", "first_step": "open", "signal": "position"},
}


def measure(model: str, task: str, batch: int, pairs: int, bar: Progress) -> dict[str, Any]:
    """One row: every contestant in turns."""
    torch._dynamo.reset()
    counters.clear()
    weights, work = answering(task, batch, TINY / MODELS[model])
    options = {"mask_token_id": work.mask, "strict": True}
    focus = torch.compile(weights, backend="focus", dynamic=True, options=options)
    dense = torch.compile(weights, dynamic=True)
    seconds: dict[str, list[float]] = {name: [] for name in SETTINGS}
    row: dict[str, Any] = {"model": model, "task": task, "commit": commit()}
    job = bar.add_task(f"{model}, {task}", total=len(SETTINGS) * (pairs + 1))
    for turn in range(pairs + 1):
        for name, scope in SETTINGS.items():
            plain = name == "inductor"
            before = compiles()
            run = work.run(Contestant(dense if plain else focus, scope, not plain))
            bar.advance(job)
            if not plain and run.result.focus_steps != run.result.forwards:
                raise RuntimeError(f"{name}: masked steps ran dense")
            if not turn:
                row[name] = {"exact": work.exact_match(run), "steps": run.result.forwards}
                continue
            if compiles() != before:
                raise RuntimeError(f"{name} compiled inside the timed region")
            seconds[name].append(run.seconds)
    for name, times in seconds.items():
        row[name] |= {"seconds": times, "ratio": _ratio(seconds["inductor"], times)}
        row[name]["over the paper's way"] = _ratio(seconds["the paper's way"], times)
    return row


def _ratio(base: list[float], times: list[float]) -> dict[str, float]:
    """How many times faster than ``base``, pair by pair."""
    return spread([a / b for a, b in zip(base, times, strict=True)])


def main(
    *,
    batch: int = 32,
    pairs: int = 9,
    threads: int = 2,
    out: Path | None = None,
    quick: Annotated[bool, typer.Option("--quick", help="one model, one task, one pair")] = False,
) -> None:
    """Measure every row that the file lacks."""
    torch.set_num_threads(threads)
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    wanted = [(model, task) for model in MODELS for task in TASK_BY_NAME]
    if quick:
        wanted, pairs = [("aligned", "total")], 1
    rows = json.loads(out.read_text())["rows"] if out is not None and out.exists() else []
    done = {(row["model"], row["task"]) for row in rows}
    about = {"batch": batch, "pairs": pairs, "threads": threads, "dtype": "fp32", "cpu": cpu()}
    about |= {"torch": torch.__version__, "transformers": transformers.__version__}
    with Progress(transient=True) as bar:
        for model, task in wanted:
            if (model, task) in done:
                continue
            rows.append(measure(model, task, batch, pairs, bar))
            bar.console.print(rows[-1])
            if out is not None:
                out.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
