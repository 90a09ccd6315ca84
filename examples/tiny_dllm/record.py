"""Write recorded.json: 20 prompts per task with the text and the steps of dense decoding.

    python record.py

Run it after training; the tests hold the decoder to this file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from decode import ALIGNED, CHECKPOINT, decode, load
from tasks import TASKS, examples


def record(checkpoint: Path, count: int, seed: int) -> dict[str, list[dict[str, object]]]:
    """Decode `count` prompts per task, each task as one batch."""
    model, tokenizer = load(checkpoint)
    recorded = {}
    for task in TASKS:
        prompts = [example.prompt for example in examples(task.name, count, seed)]
        recorded[task.name] = [
            {"prompt": prompt, "text": answer.text, "blocks": answer.blocks}
            for prompt, answer in zip(prompts, decode(model, tokenizer, prompts), strict=True)
        ]
    return recorded


def main(
    *,
    out: Path = Path(__file__).parent / "recorded.json",
    count: Annotated[int, typer.Option(min=1)] = 20,
    seed: int = 3,
) -> None:
    """Record both checkpoints."""
    torch.set_num_threads(1)
    recorded = {folder.name: record(folder, count, seed) for folder in (CHECKPOINT, ALIGNED)}
    parts = []
    for checkpoint, tasks in recorded.items():
        for task, cases in tasks.items():
            lines = ",\n".join(f"  {json.dumps(case)}" for case in cases)  # one prompt a line
            parts.append(f" {json.dumps(f'{checkpoint} {task}')}: [\n{lines}\n ]")
    out.write_text("{\n" + ",\n".join(parts) + "\n}\n")


if __name__ == "__main__":
    typer.run(main)
