"""Recorded decode orders, kept: recording costs a CPU's time, which is a rented GPU's time too.

python -m benchmarks.gpu.traces chain          # beforehand, on any machine
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import torch

from benchmarks import trace
from benchmarks.gpu.plan import ROOT, Plan
from benchmarks.shapes import ALIGNED
from benchmarks.trace import Line, Trace, assemble, record_rows

__all__ = ["ROWS", "replayed"]

ROWS = 32
"""Rows that are recorded; a larger batch repeats them."""


def replayed(task: str, batch: int, cache: str) -> Trace:
    """What a batch decodes; its rows are recorded once, and read from the cache from then on."""
    count = min(batch, ROWS)
    file = Path(cache) / f"trace-{task}-{_fingerprint()}.pt"
    rows: list[list[list[Line]]] = torch.load(file) if file.exists() else []
    if len(rows) < count:
        rows = record_rows(task, count)
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(rows, file)
    return assemble([rows[index % count] for index in range(batch)])


def _fingerprint() -> str:
    """Tells the recorded model, and the code that decodes it, from others."""
    digest = hashlib.sha256()
    files = [ALIGNED / "model.safetensors", Path(trace.__file__)]
    for file in (*files, *sorted((ROOT / "tests" / "reference").glob("*.py"))):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


if __name__ == "__main__":
    for name in sys.argv[1:]:
        replayed(name, ROWS, Plan("steps").cache)
