"""Tokens per second of eager, plain Inductor and FOCUS: one model, one loop, alternating runs.

    python benchmarks/throughput.py --shape bench-12l --batch 16 --out docs/throughput.json

Random weights, ``sequential`` decoding at a fixed number of tokens per step, two blocks, prefill
and commits included. A contestant that compiled inside the timed region, or a FOCUS run in which a
masked step ran dense, is an error and not a result. Rows are added to the file.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import transformers
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch._dynamo.utils import counters
from transformers import Qwen3Config, Qwen3ForCausalLM

import focus_compile

SHAPES: dict[str, dict[str, Any]] = {
    "bench-12l": {
        "hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 64, "intermediate_size": 1536, "vocab_size": 8192,
    },
    "sdar-0.6b": {
        "hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 3072, "vocab_size": 151936,
    },
}  # fmt: skip
"""Sizes of Qwen3 models; sdar-0.6b are those of Qwen3-0.6B."""


def main(
    shape: str = "bench-12l",
    batch: int = 16,
    block: int = 32,
    prompt: int = 32,
    blocks: int = 2,
    tokens_per_step: int = 3,
    pairs: int = 5,
    threads: int = 2,
    eager: bool = True,
    out: Path | None = None,
) -> None:
    """Measure one shape."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config = Qwen3Config(**SHAPES[shape], tie_word_embeddings=True)
    model = Qwen3ForCausalLM(config).eval()
    mask = config.vocab_size - 1
    ids = torch.randint(0, mask, (batch, prompt))
    options = {"mask_token_id": mask, "strict": True}
    contestants: dict[str, Any] = {"eager": model} if eager else {}
    contestants["inductor"] = torch.compile(model, dynamic=True)
    contestants["focus"] = torch.compile(model, backend="focus", dynamic=True, options=options)

    def run(name: str) -> tuple[float, focus_compile.Generated]:
        start = time.perf_counter()
        result = focus_compile.generate(
            contestants[name],
            ids,
            max_new_tokens=blocks * block,
            block_length=block,
            mask_token_id=mask,
            remasking_strategy="sequential",
            tokens_per_step=tokens_per_step,
            return_dict=True,
        )
        assert isinstance(result, focus_compile.Generated)
        if name == "focus" and result.focus_steps != result.forwards:
            raise SystemExit("a masked step ran dense")
        return time.perf_counter() - start, result

    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    results: dict[str, focus_compile.Generated] = {}
    with Progress(transient=True) as bar:
        job = bar.add_task("warming up", total=len(contestants) * (pairs + 1))
        for turn in range(pairs + 1):
            for name in contestants:
                before = _compiles()
                spent, results[name] = run(name)
                if turn:
                    seconds[name].append(spent)
                    if _compiles() != before:
                        raise SystemExit(f"{name} compiled inside the timed region")
                bar.advance(job)
                bar.update(job, description="measuring")
    row = {
        "shape": shape,
        "batch": batch,
        "block": block,
        "prompt": prompt,
        "blocks": blocks,
        "strategy": f"sequential, {tokens_per_step} per step",
        "threads": threads,
        "dtype": str(model.dtype),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        **{name: _figures(seconds[name], results[name]) for name in contestants},
        "ratio_focus_inductor": _ratios(seconds["inductor"], seconds["focus"]),
    }
    _print(row, list(contestants))
    if out is not None:
        rows = json.loads(out.read_text()) if out.exists() else []
        out.write_text(json.dumps([*rows, row], indent=1) + "\n")


def _compiles() -> int:
    """Graphs that Dynamo captured and programs that AOTAutograd was asked for so far."""
    cache = counters["aot_autograd"]
    return int(
        counters["stats"]["unique_graphs"]
        + cache["autograd_cache_miss"]
        + cache["autograd_cache_hit"]
    )


def _figures(seconds: list[float], result: focus_compile.Generated) -> dict[str, Any]:
    rates = sorted(result.decoded / spent for spent in seconds)
    return {
        "tokens_per_s": statistics.median(rates),
        "tokens_per_s_min": rates[0],
        "tokens_per_s_max": rates[-1],
        "steps": result.forwards,
        "fed_fraction": result.fed_fraction,
        "retained_fraction": result.retained_fraction,
    }


def _ratios(slow: list[float], fast: list[float]) -> dict[str, float]:
    """Median, least and largest ratio of the alternating pairs."""
    ratios = [a / b for a, b in zip(slow, fast, strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def _print(row: dict[str, Any], contestants: list[str]) -> None:
    console = Console()
    console.print(
        f"{row['shape']}, batch {row['batch']}, block {row['block']}, {row['strategy']}, "
        f"{row['threads']} threads, {row['dtype']}, torch {row['torch']}"
    )
    table = Table("contestant", "tokens/s", "min", "max", "steps", "fed", "retained")
    for name in contestants:
        figures = row[name]
        table.add_row(
            name,
            *(f"{figures[f'tokens_per_s{end}']:.1f}" for end in ("", "_min", "_max")),
            str(figures["steps"]),
            f"{figures['fed_fraction']:.1%}",
            f"{figures['retained_fraction']:.1%}",
        )
    console.print(table)
    ratio = row["ratio_focus_inductor"]
    console.print(
        f"focus / inductor: {ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"
    )


if __name__ == "__main__":
    typer.run(main)
