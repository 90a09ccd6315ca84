"""The command line: one stage at a time."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from benchmarks.gpu import compile as compile_stage
from benchmarks.gpu import lanes, numbers
from benchmarks.gpu import profile as profile_stage
from benchmarks.gpu import steps as steps_stage
from benchmarks.gpu.machine import machine
from benchmarks.gpu.plan import ROOT, Cell, Plan
from benchmarks.gpu.results import Results

__all__ = ["main"]

CELLS: dict[str, Callable[[Plan], list[Cell]]] = {
    "steps": steps_stage.cells,
    "profile": profile_stage.cells,
    "compile": compile_stage.cells,
}
STAGES = ("numbers", *CELLS)


def main(
    *,
    stage: Annotated[str, typer.Option(help=", ".join(STAGES))] = "",
    models: Annotated[str, typer.Option(help="0.6B, 1.7B, 8B or names of shapes")] = "0.6B",
    batches: str = "1,32,256",
    budget: Annotated[float, typer.Option(help="seconds after which no cell is begun")] = 300.0,
    limit: Annotated[float, typer.Option(help="seconds after which a cell is killed")] = 180.0,
    device: str = "cuda",
    out: Annotated[Path, typer.Option(help="folder, or file ending in .json")] = (
        ROOT / "docs" / "gpu"
    ),
    again: Annotated[bool, typer.Option("--again", help="forget what the file holds")] = False,
    contestants: Annotated[str, typer.Option(help="separated by semicolons")] = "",
    task: Annotated[str, typer.Option(help="whose decode order is replayed")] = "chain",
    history: Annotated[int, typer.Option(help="tokens before the block")] = 64,
    repeats: Annotated[int, typer.Option(help="timed generations, at most")] = 5,
    jobs: Annotated[int, typer.Option(help="numbers: processes at a time")] = 4,
    inductor: Annotated[bool, typer.Option(help="without: graphs run as captured")] = True,
    cache: Annotated[Path, typer.Option(help="all that is compiled or recorded")] = (
        ROOT / ".cache" / "gpu"
    ),
    commit: Annotated[str, typer.Option(help="of the code, where there is no git")] = "",
    quick: Annotated[bool, typer.Option("--quick", help="three layers, batch 2, on a CPU")] = False,
) -> None:
    """Measure the cells of a stage that its JSON lacks."""
    if quick:
        stage, device, models, batches = "steps", "cpu", "bench-3l", "2"
        contestants = "focus;inductor"
        repeats, inductor, out = 1, False, Path(tempfile.mkdtemp())
    if stage not in STAGES:
        raise typer.BadParameter(f"expected one of {', '.join(STAGES)}", param_hint="--stage")
    if device != "cpu" and not torch.cuda.is_available():
        raise typer.BadParameter("no GPU here: PyTorch finds none", param_hint="--device")
    plan = Plan(
        stage,
        device,
        tuple(models.split(",")),
        tuple(int(batch) for batch in batches.split(",")),
        tuple(name for name in contestants.split(";") if name),
        task,
        history,
        repeats,
        inductor,
        str(cache),
        commit,
    )
    path = out if out.suffix == ".json" else out / f"{stage}.json"
    results = Results(path.resolve(), stage, again=again)
    console = Console(width=160, highlight=False)

    def say(text: str) -> None:
        console.print(text, markup=False)

    results.note(left=[])
    if stage == "numbers":
        results.note(machine=machine(plan))
        numbers.run(plan, results, budget=budget, limit=limit, jobs=jobs, say=say)
    else:
        lanes.run(CELLS[stage](plan), plan, results, budget=budget, limit=limit, say=say)
    say(summary(results))


def summary(results: Results) -> str:
    """How many cells ended in which way."""
    counts: dict[str, int] = {}
    for found in results.cells.values():
        counts[found["outcome"]] = counts.get(found["outcome"], 0) + 1
    told = json.dumps(counts | {"left": len(results.report["left"])})
    return f"{results.path.name}: {told}"


if __name__ == "__main__":
    typer.run(main)
