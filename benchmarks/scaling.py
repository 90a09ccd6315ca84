"""Time of one FOCUS step against retained tokens, batch, block and history, and fitted slopes.

    python -m benchmarks.scaling --out docs/scaling.json
    python -m benchmarks.scaling --quick

Random weights. Each step is the first of a block: all its tokens are fed, and a signal makes every
row retain its ``kept`` leftmost tokens. The contestants of a curve take turns.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.progress import Progress

from benchmarks.provenance import commit, cpu
from benchmarks.shapes import build
from focus_compile import Signal, session
from focus_compile.generation.batch import CachedBatch


@dataclass(frozen=True)
class Point:
    """Sizes of a step; ``kept`` tokens of every row are retained."""

    batch: int = 16
    block: int = 32
    history: int = 64
    kept: int = 8


CURVES = {
    "kept": [Point(kept=kept) for kept in (8, 12, 16, 20, 24, 28, 32)],
    "batch": [Point(batch=batch) for batch in (2, 4, 8, 16, 32)],
    "block": [Point(block=block) for block in (16, 32, 64)],
    "history": [Point(history=history) for history in (16, 64, 256, 1024)],
}


def main(
    *,
    shape: str = "bench-12l",
    repeats: int = 9,
    threads: int = 2,
    out: Path | None = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="three layers, retained tokens alone")
    ] = False,
) -> None:
    """Measure every curve."""
    torch.set_num_threads(threads)
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    curves = CURVES
    if quick:
        shape, repeats, curves = "bench-3l", 3, {"kept": CURVES["kept"]}
    model = build(shape)
    mask = model.config.vocab_size - 1
    options = {"mask_token_id": mask, "strict": True}
    compiled = torch.compile(model, backend="focus", dynamic=True, options=options)
    report: dict[str, Any] = {
        "shape": shape,
        "layers": model.config.num_hidden_layers,
        "threads": threads,
        "repeats": repeats,
        "dtype": str(model.dtype),
        "torch": torch.__version__,
        "machine": cpu(),
        "commit": commit(),
        **asdict(Point()),
        "curves": {},
    }
    with Progress() as bar, torch.no_grad():
        job = bar.add_task("steps", total=sum(map(len, curves.values())) * (repeats + 2))
        for name, points in curves.items():
            report["curves"][name] = _curve(compiled, mask, name, points, repeats, bar, job)
    for name in curves:
        print(name, json.dumps(report["curves"][name]))
    if out is not None:
        out.write_text(json.dumps(report, indent=1) + "\n")


def _curve(
    model: Any, mask: int, name: str, points: list[Point], repeats: int, bar: Progress, job: Any
) -> dict[str, Any]:
    steps = [_Step(model, mask, point) for point in points]
    times: dict[str, list[list[float]]] = {
        "focus": [[] for _ in points],
        "dense": [[] for _ in points],
    }
    for turn in range(repeats + 2):
        for index, step in enumerate(steps):
            for kind, rows in times.items():
                spent = step(enabled=kind == "focus")
                if turn >= 2:  # the first two compile, and fill caches
                    rows[index].append(spent)
            bar.advance(job)
    focus, dense = ([statistics.median(t) for t in times[kind]] for kind in ("focus", "dense"))
    sizes = [getattr(point, name) for point in points]
    counts = [
        p.kept * p.batch if name == "kept" else size for p, size in zip(points, sizes, strict=True)
    ]
    slope, intercept = np.polyfit(counts, focus, 1)
    fitted = np.polyval((slope, intercept), counts)
    spread = float(np.square(np.array(focus) - np.mean(focus)).sum())
    return {
        "sizes": counts,
        "focus_s": focus,
        "dense_s": dense,
        "slope_s": float(slope),
        "intercept_s": float(intercept),
        "r2": 1.0 - float(np.square(np.array(focus) - fitted).sum()) / spread,
    }


class _Step:
    """One step of a block, to be repeated: state and cache are as before each time."""

    def __init__(self, model: Any, mask: int, point: Point) -> None:
        self.point, self.mask = point, mask
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(0, mask, (point.batch, point.history), generator=generator)
        real = torch.ones_like(ids, dtype=torch.bool)
        self.rows = CachedBatch(model, ids, real, point.block)
        self.rows.prefill()
        self.block, self.masked = self.rows.open_block(point.block, mask, mask)
        order = -torch.arange(point.block, dtype=torch.float32)
        order[0] = 1e4  # alone above mean + std: then alpha counts
        self.signal = Signal((0.0, 0.0), order.expand(point.batch, -1))

    def __call__(self, *, enabled: bool) -> float:
        kept = self.point.kept
        with session(
            self.mask, float(kept), signal=self.signal, logits="packed", enabled=enabled,
            first_step="evict",
        ) as focus:  # fmt: skip
            focus.owns_kv = True  # each step writes the block's anew
            start = time.perf_counter()
            self.rows.peek(self.block)
            spent = time.perf_counter() - start
            if enabled and focus.stats.retained != kept * self.point.batch:
                raise SystemExit(f"{focus.stats.retained} tokens were retained: wanted {kept} each")
        return spent


if __name__ == "__main__":
    typer.run(main)
