"""Where a denoising step of FOCUS spends its time, by kind of work.

    python -m benchmarks.profile_step --shape sdar-0.6b --batch 16 --out docs/profile.json
    python -m benchmarks.profile_step --quick

Replays a trace under PyTorch's profiler, whose own cost weighs on small operators.
"""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import typer
from torch.profiler import profile

from benchmarks.contest import Run, contestants, prepare
from benchmarks.provenance import commit
from focus_compile.programs.program import Program

PARTS = {
    "importance": ("focus::importance",),
    "selection": ("focus::signal", "focus::retain", "focus::tables"),
    "gathers and scatters": (
        *("focus::pack", "focus::pack_rows", "focus::repack", "focus::unpack", "focus::site_index"),
        *("focus::line_index", "focus::site_mask", "focus::visible"),
    ),
    "keys and values": ("focus::join",),
    "matrix products": ("focus::linear",),
    "attention kernel": ("aten::scaled_dot_product_attention",),
}
ATTEND = "focus::attend"


def shares(run: Run, totals: dict[str, float]) -> dict[str, float]:
    """Seconds per denoising step of each part; ``totals``: seconds of every operator."""
    steps = run.result.forwards
    out = {part: sum(totals.get(op, 0.0) for op in ops) for part, ops in PARTS.items()}
    out["gathers and scatters"] += totals[ATTEND] - out["attention kernel"]
    programs = sum(seconds for name, seconds in totals.items() if name.startswith("program"))
    out["other kernels of the programs"] = programs - sum(out.values())
    out["host"] = run.steps - programs
    out["step"] = run.steps
    return {part: seconds / steps for part, seconds in out.items()}


def main(
    *,
    shape: str = "sdar-0.6b",
    batch: int = 16,
    task: str = "chain",
    threads: int = 2,
    out: Path | None = None,
    quick: Annotated[bool, typer.Option("--quick", help="three layers, batch 4")] = False,
) -> None:
    """Profile one block."""
    torch.set_num_threads(threads)
    if quick:
        shape, batch = "bench-3l", 4
    model, work = prepare(shape, batch, f"trace:{task}")
    (contestant,) = contestants(model, work.mask, ["focus"]).values()
    work.run(contestant)
    with profile(acc_events=True) as seen, _marked():
        run = work.run(contestant)
    totals = {event.key: event.cpu_time_total / 1e6 for event in seen.key_averages()}
    report: dict[str, Any] = {"shape": shape, "batch": batch, "strategy": f"trace:{task}"}
    report |= {"threads": threads, "torch": torch.__version__, "commit": commit()}
    report["seconds"] = shares(run, totals)
    for part, seconds in report["seconds"].items():
        share = seconds / report["seconds"]["step"]
        print(f"{part:32}{1e3 * seconds:10.2f} ms {share:7.1%}")
    if out is not None:
        out.write_text(json.dumps(report, indent=1) + "\n")


def _marked() -> AbstractContextManager[Any]:
    """Name the calls of prefix and suffix in the profile."""
    call = Program.__call__

    def marked(self: Program, values: Any) -> Any:
        with torch.profiler.record_function(f"program {self.half.outputs[0]}"):
            return call(self, values)

    return mock.patch.object(Program, "__call__", marked)


if __name__ == "__main__":
    typer.run(main)
