"""Tokens per second of eager, plain Inductor and FOCUS: one model, one loop, alternating runs.

    python -m benchmarks.throughput --shape bench-12l --batch 16 --strategy trace:chain
    python -m benchmarks.throughput --full          # every row of the page that is not there yet
    python -m benchmarks.throughput --quick         # a small model, about a minute

A run generates one block after a prompt (``tiny``, the trained model: an answer). Its time is that
of denoising steps and exact commits; the prefill of the prompt is left out, as it is the same
program for all. Beside it stand the denoising steps alone.

A contestant that compiled while it was timed or broke its graph, and a FOCUS run in which a masked
step ran dense, or fed or retained other tokens than the eager FOCUS of the tests did, is an error
and not a result. Rows are kept in the file ``--out``.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch._dynamo.utils import counters
from transformers import DynamicCache

import focus_compile
from benchmarks.contest import Run, Work, compiles, contestants, prepare, spread
from benchmarks.memory import sampled
from benchmarks.provenance import commit, cpu
from benchmarks.trace import BLOCK, Trace
from focus_compile.models.masks import cache_keyword

OUT = Path(__file__).resolve().parent.parent / "docs" / "throughput.json"
FULL = [("tiny", 32, f"threshold:{task}") for task in ("total", "chain", "order")]
FULL += [("bench-12l", 16, "trace:chain"), ("sdar-0.6b", 32, "trace:total")]
FULL += [("moe-mini", 16, "trace:chain")]
FULL += [("bench-12l", 16, what) for what in ("trace:total", "sequential:3", "trace:order")]
FULL += [("sdar-0.6b", 16, "trace:chain")]
FULL += [("bench-12l", 1, "trace:chain"), ("bench-12l", 8, "trace:chain")]
FULL += [("bench-12l", 16, "fixed:3"), ("sdar-0.6b", 16, "trace:total")]
FULL += [("sdar-0.6b", 32, "trace:chain"), ("sdar-1.7b", 16, "trace:total")]
CONTESTANTS = (
    "eager;inductor;focus;focus, no delayed cache;focus, no stale K/V;focus, nothing evicted;"
    "focus, disabled"
)
FEW = "inductor;focus"
"""Of shapes whose dense step takes seconds."""
QUICK = ("bench-3l", 8, "trace:total")


class Invalid(Exception):
    """A run that is no result, and why."""


def measure(
    shape: str,
    batch: int,
    strategy: str,
    pairs: int,
    names: Sequence[str],
    bar: Progress,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """One row."""
    torch._dynamo.reset()
    counters.clear()
    model, work = prepare(shape, batch, strategy, device, dtype)
    cost = _cost(model, work)
    called = contestants(model, work.mask, names)
    runs: dict[str, list[Run]] = {name: [] for name in called}
    job = bar.add_task(f"{shape} x {batch}, {strategy}", total=len(called) * (pairs + 2))
    peaks: dict[str, dict[str, float]] = {}
    for turn in range(pairs + 1):
        for name, contestant in called.items():
            before = compiles()
            run = work.run(contestant)
            bar.advance(job)
            if not turn:
                continue
            if compiles() != before:
                raise Invalid(f"{name} compiled inside the timed region")
            if contestant.focus:
                _check(name, run, work.trace)
            runs[name].append(run)
    for name, contestant in called.items():  # after the timed runs: watching disturbs them
        with sampled(device) as peak:
            work.run(contestant)
        peaks[name] = {"peak_mib": peak.most, "peak_grown_mib": peak.most - peak.before}
        bar.advance(job)
    if counters["graph_break"]:
        raise Invalid(f"the graph broke: {dict(counters['graph_break'])}")
    row: dict[str, Any] = {
        "shape": shape,
        "batch": batch,
        "block": BLOCK,
        "prompt": work.ids.shape[1],
        "strategy": strategy,
        "pairs": pairs,
        "threads": torch.get_num_threads(),
        "dtype": str(model.dtype),
        "machine": cpu(),
        "commit": commit(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        **{name: _figures(made, work) | peaks[name] for name, made in runs.items()},
    }
    if {"inductor", "focus"} <= runs.keys():
        row |= _ratios(runs["inductor"], runs["focus"], cost, work)
        row["work_per_step"] = {name: _per_step(made[0], cost, work) for name, made in runs.items()}
        row["ratio_peak_memory"] = peaks["focus"]["peak_mib"] / peaks["inductor"]["peak_mib"]
    return row


def _cost(model: Any, work: Work) -> focus_compile.Cost:
    """FLOPs of a denoising step, as the compiler reads them off the graph."""
    ids, mask = work.ids, work.mask
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids[:, :2], use_cache=True, **{cache_keyword(model): cache})
    call = {
        "input_ids": ids.new_full((len(ids), BLOCK), mask),
        "attention_mask": ids.new_ones((len(ids), 1, BLOCK, 2 + BLOCK), dtype=torch.bool),
    }
    story = focus_compile.explain(model, **call, use_cache=True, **{cache_keyword(model): cache})
    costs = [graph.cost for graph in story.graphs if graph.cost is not None]
    if len(costs) != 1:
        raise Invalid(str(story))
    return costs[0]


def _check(name: str, run: Run, trace: Trace | None) -> None:
    """FOCUS ran in every step and, on a trace, on the tokens that the eager one had."""
    result = run.result
    if result.focus_steps != result.forwards:
        raise Invalid(f"{name}: {result.forwards - result.focus_steps} masked steps ran dense")
    if trace is None or name != "focus":
        return
    for index, (mask, step) in enumerate(zip(result.retain_masks, trace.steps, strict=True)):
        if not torch.equal(mask.cpu(), step.retained):
            raise Invalid(f"{name}: step {index} retained other tokens than the eager FOCUS")
    if result.fed_per_step != [step.fed for step in trace.steps]:
        raise Invalid(f"{name}: other tokens were fed than by the eager FOCUS")


def _figures(runs: Sequence[Run], work: Work) -> dict[str, Any]:
    rates = sorted(run.result.decoded / run.seconds for run in runs)
    result = runs[0].result
    outside = [(run.seconds - sum(run.forwards)) / run.result.forwards for run in runs]
    out = {
        "tokens_per_s": statistics.median(rates),
        "tokens_per_s_min": rates[0],
        "tokens_per_s_max": rates[-1],
        "ms_per_step": 1e3 * statistics.median(run.steps / run.result.forwards for run in runs),
        "ms_commit": 1e3 * statistics.median(statistics.mean(run.commits) for run in runs),
        "ms_outside_model": 1e3 * statistics.median(outside),
        "steps": result.forwards,
        "fed_fraction": result.fed_fraction,
        "retained_fraction": result.retained_fraction,
    }
    found = work.exact_match(runs[0])
    return out if found is None else out | {"exact_match": found}


def _ratios(
    dense: Sequence[Run], focus: Sequence[Run], cost: focus_compile.Cost, work: Work
) -> dict[str, Any]:
    """Measured ratios, pair by pair, beside those of the FLOPs of what was fed and retained."""
    (theirs, commits), (ours, our_commits) = (
        _total(runs[0], cost.flops, work) for runs in (dense, focus)
    )
    blocks = spread([d.seconds / f.seconds for d, f in zip(dense, focus, strict=True)])
    steps = spread([d.steps / f.steps for d, f in zip(dense, focus, strict=True)])
    limit = (theirs + commits) / (ours + our_commits)
    return {
        "ratio_focus_inductor": blocks,
        "ratio_steps_only": steps,
        "limit_ratio": limit,
        "limit_ratio_steps_only": theirs / ours,
        "limit_efficiency": blocks["median"] / limit,
    }


def _per_step(run: Run, cost: focus_compile.Cost, work: Work) -> dict[str, float]:
    """FLOPs and bytes of a denoising step, by the cost model."""
    counts = {"flops": cost.flops, "bytes": cost.bytes}
    return {
        name: _total(run, count, work)[0] / run.result.forwards for name, count in counts.items()
    }


def _total(run: Run, count: Callable[..., tuple[int, int]], work: Work) -> tuple[int, int]:
    """(denoising steps, commits) of a run, in what ``count`` counts."""
    result, history = run.result, work.ids.shape[1]
    batch, steps, commits, done = len(work.ids), 0, 0, 0
    for number in run.steps_per_block:
        for index in range(done, done + number):
            fed = retained = 0
            if result.focus_steps:
                fed = result.fed_per_step[index]
                retained = int(result.retain_masks[index].sum())
            dense, focus = count(batch, BLOCK, history, fed, retained)
            steps += focus if result.focus_steps else dense
        commits += count(batch, BLOCK, history, 0, 0)[0]
        done, history = done + number, history + BLOCK
    return steps, commits


def _print(row: dict[str, Any]) -> None:
    console = Console(width=120)
    console.print(
        f"{row['shape']}, batch {row['batch']}, block {row['block']}, {row['strategy']}, "
        f"{row['pairs']} pairs, {row['threads']} threads, {row['dtype']}, torch {row['torch']}"
    )
    columns = ("tokens/s", "min", "max", "ms/step", "commit", "outside", "steps", "fed", "retained")
    table = Table("contestant", *columns)
    for name, figures in row.items():
        if not isinstance(figures, dict) or "tokens_per_s" not in figures:
            continue
        table.add_row(
            name,
            *(f"{figures[f'tokens_per_s{end}']:.1f}" for end in ("", "_min", "_max")),
            *(f"{figures[key]:.1f}" for key in ("ms_per_step", "ms_commit", "ms_outside_model")),
            str(figures["steps"]),
            f"{figures['fed_fraction']:.1%}",
            f"{figures['retained_fraction']:.1%}",
        )
    console.print(table)
    if "limit_ratio" in row:
        for key, limit in (
            ("ratio_focus_inductor", "limit_ratio"),
            ("ratio_steps_only", "limit_ratio_steps_only"),
        ):
            ratio = row[key]
            console.print(
                f"{key}: {ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f}), "
                f"by FLOPs {row[limit]:.2f}: {ratio['median'] / row[limit]:.0%}"
            )


def main(
    *,
    shape: str = "bench-12l",
    batch: int = 16,
    strategy: Annotated[str, typer.Option(help="trace:TASK, fixed:N or sequential:N")] = (
        "trace:chain"
    ),
    pairs: int = 5,
    threads: int = 2,
    contestants: Annotated[str, typer.Option(help="separated by semicolons")] = CONTESTANTS,
    full: Annotated[bool, typer.Option("--full", help="every row of docs/performance.md")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="a three-layer model, two pairs")] = False,
    out: Annotated[Path | None, typer.Option(help=f"for --full: {OUT.name}")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="rows as JSON, no tables")] = False,
) -> None:
    """Measure one row, or all."""
    torch.set_num_threads(threads)
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    wanted = [(shape, batch, strategy)]
    if quick:
        wanted, pairs = [QUICK], 2
    if full:
        wanted, out = FULL, out or OUT
    rows = json.loads(out.read_text())["rows"] if out is not None and out.exists() else []
    done = {(row["shape"], row["batch"], row["strategy"], row["threads"]) for row in rows}
    with Progress(console=Console(stderr=True), transient=True) as bar:
        for key in wanted:
            if (*key, threads) in done:
                continue
            chosen = FEW if full and key[0].startswith("sdar") else contestants
            row = measure(*key, pairs, chosen.split(";"), bar)
            rows.append(row)
            if not as_json:
                _print(row)
            if out is not None:
                out.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    if as_json:
        typer.echo(json.dumps({"rows": rows}, indent=1))


if __name__ == "__main__":
    typer.run(main)
