"""Answer a file of prompts in several processes, on one machine or many.

    torchrun --nproc-per-node 2 --max-restarts 3 examples/batch_torchrun.py prompts.jsonl out.jsonl

``accelerate launch --num_processes 2 examples/batch_torchrun.py ...`` does the same. Every process
has a whole model, on the GPU of its local rank where there is one, and takes the next batch when it
is done with one. When a process dies, torchrun starts all of them again; when everything was
killed, give the same command again: batches that were written are kept. Of the processes of a
machine one compiles, then the others find its code in Inductor's cache. Several machines need one
file system for ``OUT``; a ``--cache`` there spares all but one of them the compiling. offline.py
has the file formats.
"""

from __future__ import annotations

import os
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import typer
from offline import CHECKPOINT, Job, Options, Worker
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

console = Console(stderr=True)
LONG = timedelta(hours=1)
"""How long to wait for another process to compile."""


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
    if cache is not None:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache)
    torch.set_num_threads(threads)
    try:
        job = Job(
            prompts,
            out,
            Options(model, batch, max_new_tokens, block_length, threshold, alpha, dense),
        )
    except ValueError as error:
        console.print(f"[red]{error}", highlight=False)
        raise typer.Exit(2) from error
    store, rank, world = next(dist.rendezvous("env://"))
    local, node = int(os.environ["LOCAL_RANK"]), os.environ.get("GROUP_RANK", "0")
    worker = Worker(job.options, f"cuda:{local}" if torch.cuda.is_available() else "cpu")
    compiled = f"compiled on {node if cache is None else 'one'}"
    first = rank == 0 if cache is not None else local == 0
    if not first:
        store.wait([compiled], LONG)
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=rank > 0) as bar:
        shown = bar.add_task("batches", total=len(job.parts))
        answered = 0
        while (part := store.add("taken", 1) - 1) < len(job.parts):
            if not job.done(part):
                job.write(part, worker(job.prompts(part)))
                answered += len(job.parts[part])
                store.set(compiled, "yes")
            bar.update(shown, completed=store.add("done", 1))
        store.set(compiled, "yes")
        store.add("left", 1)
        while rank == 0 and store.add("left", 0) < world:  # whose store this may be
            bar.update(shown, completed=store.add("done", 0))
            time.sleep(0.1)
    console.print(f"rank {rank} answered {answered} of {len(job.rows)} prompts", highlight=False)
    if rank == 0:
        job.merge()


if __name__ == "__main__":
    typer.run(main)
