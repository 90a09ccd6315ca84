"""Wall time to the end of the second block, compilation counted: plain Inductor and FOCUS.

    python -m benchmarks.compile_time --out docs/compile_time.json
    python -m benchmarks.compile_time --quick

"capture": one call of a block with masks and one of the same shape without, so that a single graph
is captured and each of its programs is compiled. Every run is a process of its own; "cold" has an
empty Inductor cache, "warm" the one that the cold run of the same contestant left. Contestants
alternate. Rows that the file ``--out`` has are not run again.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from transformers import DynamicCache

import focus_compile
from benchmarks.contest import now
from benchmarks.provenance import commit, cpu
from benchmarks.shapes import build

SHAPES = ("bench-3l", "bench-12l")
CONTESTANTS = ("inductor", "focus")
WORK = ("blocks", "capture")


def child(shape: str, contestant: str, what: str, threads: int) -> dict[str, Any]:
    """One process: compile, and generate two blocks or call one graph twice."""
    torch.set_num_threads(threads)
    model = build(shape)
    mask = model.config.vocab_size - 1
    options = {"mask_token_id": mask, "strict": True} if contestant == "focus" else None
    compiled = torch.compile(model, backend=contestant, dynamic=True, options=options)
    ids = torch.randint(0, mask, (4, 24), generator=torch.Generator().manual_seed(1))
    if what == "blocks":
        found = blocks(compiled, ids, mask)
    else:
        found = _capture(model, compiled, ids, mask)
    captures = int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    if what == "capture" and captures != 1:
        raise RuntimeError(f"{captures} graphs were captured instead of one")
    return {"seconds": found, "captures": captures}


@torch.no_grad()
def _capture(model: Any, compiled: Any, ids: Tensor, mask: int) -> float:
    start, seconds = 0.0, 0.0
    for block in (torch.full((len(ids), 32), mask), ids.repeat(1, 2)[:, :32].contiguous()):
        cache = DynamicCache(config=model.config)
        model(ids, None, None, cache, use_cache=True)
        keys = ids.shape[1] + block.shape[1]
        visible = torch.ones(len(ids), 1, block.shape[1], keys, dtype=torch.bool)
        start = time.perf_counter()
        compiled(block, visible, None, cache, use_cache=True)
        seconds += time.perf_counter() - start
    return seconds


def blocks(compiled: Any, ids: Tensor, mask: int) -> float:
    """Seconds to the end of the second block, all that is compiled on the way included."""
    seconds: list[float] = []
    start = time.perf_counter()

    class Clock:
        """Notes when the prompt, and each block, is through."""

        def put(self, _: Any) -> None:
            seconds.append(now() - start)

        def end(self) -> None:
            pass

    focus_compile.generate(
        compiled,
        ids,
        max_new_tokens=64,
        mask_token_id=mask,
        remasking_strategy="fixed",
        tokens_per_step=8,
        streamer=Clock(),  # type: ignore[arg-type]
    )
    return seconds[-1]


def main(
    *,
    runs: int = 3,
    threads: int = 2,
    out: Path | None = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="one capture of three layers, cold")
    ] = False,
    as_child: str | None = None,
) -> None:
    """Measure all shapes; with ``--as-child shape,contestant,work`` one run."""
    if as_child is not None:
        shape, contestant, what = as_child.split(",")
        print(json.dumps(child(shape, contestant, what, threads)))
        return
    wanted, caches = list(itertools.product(SHAPES, WORK)), ["cold", "warm"]
    if quick:
        wanted, caches, runs = [("bench-3l", "capture")], ["cold"], 1
    rows = json.loads(out.read_text())["rows"] if out is not None and out.exists() else []
    done = {(row["shape"], row["work"]) for row in rows}
    for shape, what in wanted:
        if (shape, what) in done:
            continue
        seconds: dict[str, dict[str, list[float]]] = {
            label: {name: [] for name in CONTESTANTS} for label in caches
        }
        for _ in range(runs):
            for name in CONTESTANTS:
                with tempfile.TemporaryDirectory() as cache:
                    for label in caches:
                        spent = _spawn(f"{shape},{name},{what}", threads, cache)
                        seconds[label][name].append(spent)
                        print(shape, what, name, label, f"{spent:.1f} s", flush=True)
        row: dict[str, Any] = {"shape": shape, "work": what, "runs": runs, "threads": threads}
        row |= {"torch": torch.__version__, "machine": cpu(), "commit": commit()}
        for label, kind in seconds.items():
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


def _spawn(contest: str, threads: int, cache: str) -> float:
    command = [sys.executable, "-m", "benchmarks.compile_time", "--threads", str(threads)]
    made = subprocess.run(
        [*command, "--as-child", contest],
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache},
        check=True,
        capture_output=True,
        text=True,
    )
    return float(json.loads(made.stdout.splitlines()[-1])["seconds"])


if __name__ == "__main__":
    typer.run(main)
