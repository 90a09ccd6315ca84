"""Answer a file of prompts in several processes, on one machine or many.

    torchrun --nproc-per-node 2 --max-restarts 3 examples/batch_torchrun.py prompts.jsonl out.jsonl

Run by ``python`` it is one process. Every process has a whole model, on the GPU of its local rank
where there is one, and takes the next batch when it is done with one. When a process dies, torchrun
starts all of them again; when everything was killed, give the same command again: batches that were
written are kept. All processes share Inductor's cache (``--cache``): what one has compiled, the
others load. Several machines need one file system for ``OUT``; with the cache there too, a job of
one prompt compiles for all of them. offline.py has the file formats.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
import typer
from offline import CHECKPOINT, Job, Options, Worker
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

console = Console(stderr=True)


def main(
    prompts: Path,
    out: Path,
    *,
    model: str = str(CHECKPOINT),
    batch: int = 16,
    max_new_tokens: int = 96,
    block_length: int = 32,
    threshold: float = 0.9,
    alpha: float = 1.5,
    dense: bool = False,
    cache: Path | None = None,
    threads: int = 1,
) -> None:
    """Answer the lines of PROMPTS, ``{"prompt": text}`` each, and write OUT."""
    began = time.monotonic()
    if cache is not None:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache)
    torch.set_num_threads(threads)
    try:
        job = Job(
            prompts,
            out,
            Options(model, batch, max_new_tokens, block_length, threshold, alpha, dense),
        )
    except (ValueError, OSError) as error:
        console.print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from error
    alone = "RANK" not in os.environ
    store, rank, world = (dist.HashStore(), 0, 1) if alone else next(dist.rendezvous("env://"))
    gpu = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    worker = Worker(job.options, gpu if torch.cuda.is_available() else "cpu")
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=rank > 0) as bar:
        shown = bar.add_task("batches", total=len(job.parts))
        counts, times = list[int](), list[float]()
        while (part := store.add("taken", 1) - 1) < len(job.parts):
            if not job.done(part):
                job.write(part, worker(job.prompts(part)))
                counts.append(len(job.parts[part]))
                times.append(time.monotonic() - began)
            bar.update(shown, completed=store.add("done", 1))
        store.add("left", 1)
        while rank == 0 and store.add("left", 0) < world:  # whose store this may be
            bar.update(shown, completed=store.add("done", 0))
            time.sleep(0.1)
    told = f"rank {rank} answered {sum(counts)} of {len(job.rows)} prompts"
    if len(times) > 1:
        rate = sum(counts[1:]) / (times[-1] - times[0])
        told += f", the first batch after {times[0]:.1f} s, then {rate:.2f} prompts/s"
    console.print(told, highlight=False, soft_wrap=True)
    if rank == 0:
        for error in job.merge():
            console.print(error, style="red", markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
