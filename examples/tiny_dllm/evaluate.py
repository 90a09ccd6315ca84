"""Exact match, steps per block and decodable fraction of dense decoding, per task.

python evaluate.py --n 1000 --threads 2
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from statistics import fmean
from typing import Annotated

import torch
import typer
from decode import CHECKPOINT, Decoded, decode, load
from language import BLOCK_LENGTH
from rich.console import Console
from rich.progress import Progress
from tasks import TASKS, Example, examples

console = Console(stderr=True)


def score(drawn: list[Example], decoded: list[Decoded]) -> dict[str, object]:
    """One task's figures; exact match also by the number of blocks of the right answer."""
    right = [d.ended and d.text == e.answer for e, d in zip(drawn, decoded, strict=True)]
    spans = [len(e.answer) // BLOCK_LENGTH + 1 for e in drawn]  # EOS included
    by_span = {
        span: [hit for hit, s in zip(right, spans, strict=True) if s == span]
        for span in sorted(set(spans))
    }
    blocks = [block for d in decoded for block in d.blocks]
    counts = [count for block in blocks for count in block]
    return {
        "n": len(drawn),
        "exact_match": fmean(right),
        "exact_match_by_blocks": {str(s): round(fmean(hits), 4) for s, hits in by_span.items()},
        "n_by_blocks": {str(s): len(hits) for s, hits in by_span.items()},
        "steps_per_block": fmean(len(block) for block in blocks),
        "decodable_fraction_per_step": fmean(count / BLOCK_LENGTH for count in counts),
        "single_token_steps": fmean(count == 1 for count in counts),
        "blocks": len(blocks),
        "steps": len(counts),
    }


def main(
    *,
    n: Annotated[int, typer.Option(min=1, help="prompts per task")] = 1000,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    seed: int = 1,
    threshold: Annotated[float, typer.Option(min=0.0, max=1.0)] = 0.9,
    batch: Annotated[int, typer.Option(min=1)] = 50,
    checkpoint: Path = CHECKPOINT,
    out: Annotated[Path | None, typer.Option(help="JSON file; standard output if none")] = None,
) -> None:
    """Decode n prompts per task and write the figures as JSON."""
    torch.set_num_threads(threads)
    try:
        model, tokenizer = load(checkpoint)
    except FileNotFoundError as error:
        console.print(f"[red]{error}")
        raise typer.Exit(2) from error
    report: dict[str, object] = {"seed": seed, "threshold": threshold, "threads": threads}
    with Progress(console=console) as bar:
        for task in TASKS:
            drawn = examples(task.name, n, seed)
            # batches of similar length: the batch's longest answer decides what it costs
            order = sorted(range(n), key=lambda i: (len(drawn[i].answer), i))
            decoded: dict[int, Decoded] = {}
            row = bar.add_task(task.name, total=n)
            start = time.perf_counter()
            for at in range(0, n, batch):
                chosen = order[at : at + batch]
                answers = decode(
                    model, tokenizer, [drawn[i].prompt for i in chosen], threshold=threshold
                )
                decoded.update(zip(chosen, answers, strict=True))
                bar.update(row, advance=len(chosen))
            figures = score(drawn, [decoded[i] for i in range(n)])
            report[task.name] = {**figures, "seconds": round(time.perf_counter() - start, 1)}
    text = json.dumps(report, indent=2)
    if out is None:
        typer.echo(text)
    else:
        out.write_text(text + "\n")


if __name__ == "__main__":
    typer.run(main)
