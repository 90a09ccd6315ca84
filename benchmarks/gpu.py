"""Everything that needs a GPU, by one command.

    python -m benchmarks.gpu --out docs/gpu.json

Runs the tests that launch kernels, measures the device's roofs (a large matrix product, a large
copy), then tokens per second of plain Inductor and FOCUS on random weights in the sizes of SDAR-8B,
and sets each denoising step beside what the roofs allow. Takes nothing from the network.
``--device cpu --shape bench-3l --batches 8`` goes the same way on any machine.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.contest import now
from benchmarks.provenance import commit
from benchmarks.throughput import measure

ROOT = Path(__file__).resolve().parent.parent


def machine(device: str) -> dict[str, Any]:
    """What the figures hold for."""
    out: dict[str, Any] = {"device": device, "torch": torch.__version__, "commit": commit()}
    if device != "cpu":
        import triton  # a CPU build of PyTorch comes without

        properties = torch.cuda.get_device_properties(device)
        out |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gib": properties.total_memory / 2**30,
            "cuda": torch.version.cuda,
            "triton": triton.__version__,
        }
    return out


def tests() -> dict[str, Any]:
    """The tests marked ``gpu``: equality with eager and with the kernels' specification."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "gpu", "-q"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return {"exit_status": done.returncode, "closing_line": done.stdout.splitlines()[-1]}


def roofs(device: str, dtype: torch.dtype) -> dict[str, float]:
    """FLOPs per second of a square matrix product, bytes per second of a copy; medians of 10."""
    size = 8192 if device != "cpu" else 1024
    left, right = torch.randn(2, size, size, device=device, dtype=dtype).unbind()
    source = torch.empty(2**30 if device != "cpu" else 2**27, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return {
        "flops_per_s": 2 * size**3 / _seconds(lambda: left @ right),
        "bytes_per_s": 2 * source.numel() / _seconds(lambda: target.copy_(source)),
    }


def _seconds(function: Callable[[], Any]) -> float:
    times = []
    for _ in range(13):
        start = now()
        function()
        times.append(now() - start)
    return statistics.median(times[3:])


def bounds(row: dict[str, Any], roof: dict[str, float]) -> dict[str, dict[str, float]]:
    """Milliseconds that the roofs allow for a step of each contestant, and the share reached."""
    out = {}
    for name, work in row["work_per_step"].items():
        compute = 1e3 * work["flops"] / roof["flops_per_s"]
        memory = 1e3 * work["bytes"] / roof["bytes_per_s"]
        bound = max(compute, memory)
        out[name] = {
            "compute_ms": compute,
            "memory_ms": memory,
            "share_of_roof": bound / row[name]["ms_per_step"],
        }
    return out


def show(row: dict[str, Any]) -> None:
    """A row as a table."""
    ratio = row["ratio_focus_inductor"]
    title = (
        f"{row['shape']}, batch {row['batch']}, {row['strategy']}, {row['dtype']}: FOCUS / "
        f"Inductor {ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f}), by FLOPs "
        f"{row['limit_ratio']:.2f}"
    )
    table = Table("contestant", "tokens/s", "ms/step", "compute ms", "memory ms", "of roof")
    for name, bound in row["roofline"].items():
        table.add_row(
            name,
            f"{row[name]['tokens_per_s']:.1f}",
            f"{row[name]['ms_per_step']:.2f}",
            f"{bound['compute_ms']:.2f}",
            f"{bound['memory_ms']:.2f}",
            f"{bound['share_of_roof']:.0%}",
        )
    console = Console(width=120)
    console.print(title)
    console.print(table)


def main(
    *,
    device: str = "cuda",
    shape: str = "sdar-8b",
    batches: str = "32,64,128,256",
    strategies: str = "trace:chain,trace:total",
    pairs: int = 5,
    out: Path | None = None,
) -> None:
    """Run the tests, measure roofs and rows, write JSON."""
    if device != "cpu" and not torch.cuda.is_available():
        raise typer.BadParameter("no GPU here: PyTorch finds none", param_hint="--device")
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    started = time.time()
    report: dict[str, Any] = {"machine": machine(device), "rows": []}
    if device != "cpu":
        report["tests"] = tests()
    report["roofs"] = roofs(device, dtype)
    with Progress(transient=True) as bar:
        for batch in map(int, batches.split(",")):
            for strategy in strategies.split(","):
                names = ("inductor", "focus")
                row = measure(shape, batch, strategy, pairs, names, bar, device, dtype)
                row["roofline"] = bounds(row, report["roofs"])
                report["rows"].append(row)
                report["seconds"] = time.time() - started
                show(row)
                if out is not None:
                    out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
