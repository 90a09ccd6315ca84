"""Decode the same prompts densely and with FOCUS, side by side.

    python examples/quickstart.py

Uses a small diffusion LLM of examples/tiny_dllm: the one whose importance delta was trained to
point at decodable tokens. ``--checkpoint examples/tiny_dllm/checkpoint`` shows what FOCUS does to a
model on which it does not. Both contestants are one compiled model, run by the same loop at the
same confidence threshold; "dense" has FOCUS switched off: every step is the graph that plain
Inductor runs. Each decodes once to compile, and then in turns, for the timing.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from pathlib import Path

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen3ForCausalLM

import focus_compile
from focus_compile.generation.text import answers as texts_of
from focus_compile.generation.text import end_tokens, left_padded, prompt_ids

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "tiny_dllm"))
from tasks import TASK_BY_NAME  # noqa: E402

BLOCK = 32


def main(
    checkpoint: Path = HERE / "tiny_dllm" / "aligned_checkpoint",
    batch: int = 16,
    rounds: int = 3,
    threads: int = 2,
    threshold: float = 0.9,
    seed: int = 0,
) -> None:
    """Decode ``batch`` prompts of every task with both backends and print what came out."""
    torch.set_num_threads(threads)
    console = Console()
    if not checkpoint.is_dir():
        raise typer.BadParameter(f"no checkpoint at {checkpoint}")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = Qwen3ForCausalLM.from_pretrained(checkpoint).eval()
    console.print(
        f"torch {torch.__version__}, {threads} threads, {model.dtype}, batch {batch}, "
        f"block {BLOCK}, confidence threshold {threshold}"
    )
    options = {"mask_token_id": tokenizer.mask_token_id, "strict": True}
    compiled = torch.compile(model, backend="focus", dynamic=True, options=options)
    contestants = ("dense", "focus")
    rng = random.Random(seed)
    prompts = {
        name: [task.example(rng, rng.random()).prompt for _ in range(batch)]
        for name, task in TASK_BY_NAME.items()
    }

    def decode(name: str, texts: list[str]) -> tuple[list[str], float, focus_compile.Generated]:
        fed = encode(tokenizer, texts)
        start = time.perf_counter()
        with focus_compile.session(enabled=name == "focus"):
            out = focus_compile.generate(
                compiled,
                **fed,
                max_new_tokens=96,
                block_length=BLOCK,
                confidence_threshold=threshold,
                mask_token_id=tokenizer.mask_token_id,
                eos_token_id=end_tokens(tokenizer, model),
                return_dict=True,
            )
        seconds = time.perf_counter() - start
        made = out.sequences[:, fed["input_ids"].shape[1] :]
        return texts_of(tokenizer, made), seconds, out

    table = Table("task", "backend", "exact", "steps", "tokens/s", "fed", "retained")
    with Progress(console=console, transient=True) as bar:
        total = len(prompts) * len(contestants) * (rounds + 1)
        job = bar.add_task("compiling and decoding", total=total)
        for task, texts in prompts.items():
            seconds: dict[str, list[float]] = {name: [] for name in contestants}
            results = {}
            for turn in range(rounds + 1):
                for name in contestants:
                    answers, spent, out = decode(name, texts)
                    results[name] = (answers, out)
                    if turn:
                        seconds[name].append(spent)
                    bar.advance(job)
            for name, (answers, out) in results.items():
                right = sum(
                    TASK_BY_NAME[task].solve(text) == answer
                    for text, answer in zip(texts, answers, strict=True)
                )
                speed = out.decoded / statistics.median(seconds[name])
                table.add_row(
                    task,
                    name,
                    f"{right}/{batch}",
                    str(out.forwards),
                    f"{speed:.0f}",
                    f"{out.fed_fraction:.0%}",
                    f"{out.retained_fraction:.0%}",
                )
                if name == "focus" and not out.focus_steps:
                    raise SystemExit("FOCUS did not run: see the warnings above")
            console.print(f"[bold]{task}[/bold]  {texts[0]}", highlight=False)
            for name, (answers, _) in results.items():
                console.print(f"  {name:>8}: {answers[0]}", markup=False, highlight=False)
    console.print(table)
    console.print("fed, retained: share of the block's tokens that early and later layers computed")


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> dict[str, torch.Tensor]:
    """Token ids and attention mask ``[B, P]``, padded on the left."""
    ids, real = left_padded([prompt_ids(tokenizer, text) for text in texts])
    return {"input_ids": ids, "attention_mask": real}


if __name__ == "__main__":
    typer.run(main)
