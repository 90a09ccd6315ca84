"""One and two worker processes on one file of prompts, with an empty cache and with a full one.

    python -m benchmarks.scale --out docs/scale.json

Runs examples/batch_torchrun.py, one thread per worker. Cold runs begin with an empty Inductor cache,
warm ones with that of the cold run before. Contestants take turns.
"""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
import typer
from rich.progress import track

from benchmarks.provenance import commit

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
TOLD = re.compile(
    r"rank \d answered (\d+) of \d+ prompts, the first batch after ([\d.]+) s, then ([\d.]+)"
)


def prompts(path: Path, count: int) -> None:
    """As many of every task of the toy as of the others."""
    sys.path.insert(0, str(EXAMPLES / "tiny_dllm"))
    from tasks import TASK_BY_NAME, examples

    drawn = [each for name in TASK_BY_NAME for each in examples(name, count // 3, 7)]
    path.write_text("".join(json.dumps({"prompt": each.prompt}) + "\n" for each in drawn))


def run(workers: int, given: Path, out: Path, cache: Path, batch: int) -> dict[str, Any]:
    """One job: seconds of the whole process, and what its workers say of themselves."""
    script = [str(EXAMPLES / "batch_torchrun.py"), str(given), str(out)]
    options = ["--batch", str(batch), "--cache", str(cache)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    start = time.perf_counter()
    made = subprocess.run(
        [*torchrun, f"--nproc-per-node={workers}", *script, *options],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = time.perf_counter() - start
    told = [tuple(map(float, found)) for found in TOLD.findall(made.stderr)]
    if made.returncode or len(told) != workers:
        raise RuntimeError(made.stderr)
    return {
        "seconds": seconds,
        "prompts": [int(count) for count, _, _ in told],
        "first_batch_s": max(first for _, first, _ in told),
        "prompts_per_s": sum(rate for _, _, rate in told),
    }


def main(*, count: int = 576, batch: int = 8, rounds: int = 2, out: Path | None = None) -> None:
    """Run one and two workers in turns, each cold and then warm."""
    names = ("1 cold", "1 warm", "2 cold", "2 warm")
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    texts = set()
    for number in track(range(rounds)):
        for workers in (1, 2):
            with tempfile.TemporaryDirectory() as folder:
                root = Path(folder)
                prompts(root / "prompts.jsonl", count)
                for state in ("cold", "warm"):
                    made = root / f"{state}.jsonl"
                    figures = run(workers, root / "prompts.jsonl", made, root / "cache", batch)
                    runs[f"{workers} {state}"].append(figures)
                    texts.add(made.read_text())
                    print(number, workers, state, figures, flush=True)
    report = {
        "python": platform.python_version(), "torch": torch.__version__,
        "transformers": transformers.__version__, "machine": platform.machine(),
        "cores": os.cpu_count(), "threads_per_worker": 1, "dtype": "torch.float32",
        "commit": commit(), "prompts": count, "batch": batch, "max_new_tokens": 96,
        "equal": len(texts) == 1, "runs": runs,
        "median": {
            name: {
                key: statistics.median(each[key] for each in found)
                for key in ("seconds", "first_batch_s", "prompts_per_s")
            }
            for name, found in runs.items()
        },
    }  # fmt: skip
    if out is not None:
        out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
