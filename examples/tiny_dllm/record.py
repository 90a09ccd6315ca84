"""Write recorded.json: 20 prompts per task with the text and the steps that dense decoding gave.

    python record.py

Run it after training; the tests hold the decoder to this file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from decode import CHECKPOINT, decode, load
from tasks import TASKS, examples


def main(
    *,
    checkpoint: Path = CHECKPOINT,
    out: Path = Path(__file__).parent / "recorded.json",
    count: Annotated[int, typer.Option(min=1)] = 20,
    seed: int = 3,
) -> None:
    """Decode `count` prompts per task, each task as one batch."""
    torch.set_num_threads(1)
    model, tokenizer = load(checkpoint)
    recorded = {}
    for task in TASKS:
        prompts = [example.prompt for example in examples(task.name, count, seed)]
        recorded[task.name] = [
            {"prompt": prompt, "text": answer.text, "blocks": answer.blocks}
            for prompt, answer in zip(prompts, decode(model, tokenizer, prompts), strict=True)
        ]
    lines = [
        f" {json.dumps(name)}: [\n" + ",\n".join(f"  {json.dumps(c)}" for c in cases) + "\n ]"
        for name, cases in recorded.items()
    ]
    out.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    typer.run(main)
