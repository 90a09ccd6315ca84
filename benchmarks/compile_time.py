"""Wall time to the end of the second block, compilation counted: plain Inductor and FOCUS.

    python -m benchmarks.compile_time --out docs/compile_time.json

Every run is a process of its own; "cold" has an empty Inductor cache, "warm" the one that the cold
run of the same contestant left. Contestants alternate.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import typer

import focus_compile
from benchmarks.shapes import build

SHAPES = ("bench-3l", "bench-12l")
CONTESTANTS = ("inductor", "focus")


def child(shape: str, contestant: str, threads: int) -> dict[str, Any]:
    """One process: compile, and generate two blocks."""
    torch.set_num_threads(threads)
    model = build(shape)
    mask = model.config.vocab_size - 1
    options = {"mask_token_id": mask, "strict": True} if contestant == "focus" else None
    compiled = torch.compile(model, backend=contestant, dynamic=True, options=options)
    ids = torch.randint(0, mask, (4, 24), generator=torch.Generator().manual_seed(1))
    seconds: list[float] = []
    start = time.perf_counter()

    class Clock:
        """Notes when the prompt, and each block, is through."""

        def put(self, _: Any) -> None:
            seconds.append(time.perf_counter() - start)

        def end(self) -> None:
            pass

    focus_compile.generate(
        compiled,  # type: ignore[arg-type]
        ids,
        max_new_tokens=64,
        mask_token_id=mask,
        remasking_strategy="fixed",
        tokens_per_step=8,
        streamer=Clock(),  # type: ignore[arg-type]
    )
    return {"seconds": seconds[-1], "captures": _captures()}


def _captures() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def main(
    *,
    runs: int = 3,
    threads: int = 2,
    out: Path | None = None,
    as_child: str | None = None,
) -> None:
    """Measure all shapes; with ``--as-child shape,contestant`` one run."""
    if as_child is not None:
        shape, contestant = as_child.split(",")
        print(json.dumps(child(shape, contestant, threads)))
        return
    rows = []
    for shape in SHAPES:
        cold: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
        warm: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
        for _ in range(runs):
            for name in CONTESTANTS:
                with tempfile.TemporaryDirectory() as cache:
                    for kind in (cold, warm):
                        kind[name].append(_spawn(shape, name, threads, cache)["seconds"])
                        print(shape, name, kind[name][-1], flush=True)
        row: dict[str, Any] = {"shape": shape, "runs": runs, "threads": threads}
        row |= {"torch": torch.__version__, "machine": platform.machine()}
        for label, kind in (("cold", cold), ("warm", warm)):
            ratios = [f / d for d, f in zip(kind["inductor"], kind["focus"], strict=True)]
            row[label] = {
                **{name: statistics.median(kind[name]) for name in CONTESTANTS},
                "ratio": statistics.median(ratios),
                "ratio_min": min(ratios),
                "ratio_max": max(ratios),
            }
        rows.append(row)
        print(row)
    if out is not None:
        out.write_text(json.dumps({"rows": rows}, indent=1) + "\n")


def _spawn(shape: str, contestant: str, threads: int, cache: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.compile_time", "--threads", str(threads)]
    made = subprocess.run(
        [*command, "--as-child", f"{shape},{contestant}"],
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache},
        check=True,
        capture_output=True,
        text=True,
    )
    found: dict[str, Any] = json.loads(made.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    typer.run(main)
