"""Answer a file of prompts with Ray Data, on a cluster or on this machine; extra ``[ray]``.

    python examples/batch_ray.py prompts.jsonl out.jsonl --workers 2

Each worker is an actor with a whole model that Ray hands batches to; it starts a dead one again and
gives its batch to another. When everything was killed, give the same command again: batches that
were written are kept. A cluster needs one file system for ``OUT``. offline.py has the file formats.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import ray
import ray.data
import torch
import typer
from offline import CHECKPOINT, Job, Options, Worker
from rich.console import Console
from rich.progress import Progress

console = Console(stderr=True)


class Answerer:
    """One worker: writes the parts that it is handed."""

    def __init__(self, job: Job, threads: int) -> None:
        torch.set_num_threads(threads)
        self.job, self.worker = job, Worker(job.options, _device())

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        part = row["part"]
        if not self.job.done(part):  # an actor may die after it has written
            self.job.write(part, self.worker(self.job.prompts(part)))
        return {"part": part, "prompts": len(self.job.parts[part]), "worker": os.getpid()}


def main(
    prompts: Path,
    out: Path,
    *,
    workers: int = 2,
    model: str = str(CHECKPOINT),
    batch: int = 16,
    max_new_tokens: int = 96,
    block_length: int = 32,
    threshold: float = 0.9,
    alpha: float = 1.5,
    dense: bool = False,
    threads: int = 1,
    address: str | None = None,
) -> None:
    """Answer the lines of PROMPTS, ``{"prompt": text}`` each, and write OUT."""
    try:
        job = Job(
            prompts.resolve(),
            out.resolve(),
            Options(model, batch, max_new_tokens, block_length, threshold, alpha, dense),
        )
    except (ValueError, OSError) as error:
        console.print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from error
    ray.init(address, num_cpus=None if address else workers, include_dashboard=False)
    ray.data.DataContext.get_current().enable_progress_bars = False  # there is one below
    gpus = 1 if ray.cluster_resources().get("GPU", 0) >= workers else 0
    answered: dict[int, int] = {}
    with Progress(console=console) as bar:
        shown = bar.add_task("batches", total=len(job.parts))
        missing = job.missing()
        bar.update(shown, completed=len(job.parts) - len(missing))
        if missing:
            done = ray.data.from_items([{"part": part} for part in missing]).map(
                Answerer,
                fn_constructor_args=(job, threads),
                compute=ray.data.ActorPoolStrategy(size=workers),
                num_cpus=1,
                num_gpus=gpus,
            )
            for row in done.iter_rows():
                answered[row["worker"]] = answered.get(row["worker"], 0) + row["prompts"]
                bar.advance(shown)
    for error in job.merge():
        console.print(error, style="red", markup=False, highlight=False, soft_wrap=True)
    shares = ", ".join(map(str, answered.values()))
    console.print(f"workers answered {shares or 0} of {len(job.rows)} prompts", highlight=False)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    typer.run(main)
