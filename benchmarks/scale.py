"""One and two worker processes on one file of prompts, with an empty cache and with a full one.

    python -m benchmarks.scale --out docs/scale.json
    python -m benchmarks.scale --quick

Runs examples/batch_torchrun.py, one thread per worker. Cold runs begin with an empty Inductor
cache, warm ones with that of the cold run before. Contestants take turns.
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
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.progress import track
from transformers import DynamicCache, Qwen3Config, Qwen3ForCausalLM

import focus_compile
from benchmarks.provenance import commit, cpu
from focus_compile.models.masks import cache_keyword

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
LARGE = {
    "hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 12288, "vocab_size": 151936,
}  # fmt: skip
BATCH, BLOCK, HISTORY = 64, 32, 512
TRACES = {"chain": (0.574, 0.154, 32), "total": (0.42, 0.42, 10)}
"""Shares of tokens that are fed and retained, and steps per block: docs/throughput.json."""
USE, TFLOPS, TBYTES, USD = 0.4, 989, 3.35, 2
"""Assumed of a GPU: the share of its bf16 FLOPs that is used, its data sheet, dollars per hour."""
TOLD = re.compile(
    r"rank \d answered (\d+) of \d+ prompts, the first batch after ([\d.]+) s, then ([\d.]+)"
)


def prompts(path: Path, count: int) -> None:
    """As many of every task of the toy as of the others."""
    sys.path.insert(0, str(EXAMPLES / "tiny_dllm"))
    from tasks import TASK_BY_NAME, examples

    drawn = [each for name in TASK_BY_NAME for each in examples(name, count // 3, 7)]
    path.write_text("".join(json.dumps({"prompt": each.prompt}) + "\n" for each in drawn))


def run(
    workers: int, given: Path, out: Path, cache: Path, batch: int, dense: bool
) -> dict[str, Any]:
    """One job: seconds of the whole process, and what its workers say of themselves."""
    script = [str(EXAMPLES / "batch_torchrun.py"), str(given), str(out)]
    options = ["--batch", str(batch), "--cache", str(cache), *["--dense"] * dense]
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


def cost() -> dict[str, Any]:
    """Dollars for a million tokens, of FLOPs and bytes alone; nothing is run.

    A step takes as long as its FLOPs or its bytes, whichever is longer; a block takes its steps,
    and one dense step that commits it.
    """
    with torch.device("meta"):
        model = Qwen3ForCausalLM(Qwen3Config(**LARGE)).to(torch.bfloat16).eval()
        cache = DynamicCache(config=model.config)
        shape = (BATCH, LARGE["num_key_value_heads"], HISTORY, LARGE["head_dim"])
        for layer in range(LARGE["num_hidden_layers"]):
            keys, values = (torch.empty(shape, dtype=torch.bfloat16) for _ in range(2))
            cache.update(keys, values, layer)
        ids = torch.zeros(BATCH, BLOCK, dtype=torch.int64)
        mask = torch.ones(BATCH, 1, BLOCK, HISTORY + BLOCK, dtype=torch.bool)
    with torch.no_grad():
        story = focus_compile.explain(
            model,
            input_ids=ids,
            attention_mask=mask,
            use_cache=True,
            **{cache_keyword(model): cache},
        )
    found = story.graphs[0].cost
    assert found is not None, str(story)
    tokens = BATCH * BLOCK
    rows = []
    for trace, (fed, retained, steps) in TRACES.items():
        counts = (BATCH, BLOCK, HISTORY, round(fed * tokens), round(retained * tokens))
        times = [
            max(flops / (USE * TFLOPS * 1e12), moved / (TBYTES * 1e12))
            for flops, moved in zip(found.flops(*counts), found.bytes(*counts), strict=True)
        ]
        dense, focus = times
        usd = [USD / 3600 * (steps * step + dense) / tokens * 1e6 for step in times]
        rows.append(
            {"trace": trace, "fed": fed, "retained": retained, "steps": steps,
             "dense_s": dense, "focus_s": focus, "dense_usd": usd[0], "focus_usd": usd[1],
             "ratio": usd[0] / usd[1]}
        )  # fmt: skip
    return {
        "model": "a Qwen3 of 8B sizes", "sizes": LARGE, "batch": BATCH, "block": BLOCK,
        "history": HISTORY, "use": USE, "tflops": TFLOPS, "tbytes": TBYTES, "usd_per_hour": USD,
        "rows": rows,
    }  # fmt: skip


def main(
    *,
    count: int = 576,
    batch: int = 8,
    rounds: int = 2,
    out: Path | None = None,
    quick: Annotated[bool, typer.Option("--quick", help="one worker, densely, cold")] = False,
) -> None:
    """Run one and two workers in turns, each cold and then warm."""
    if quick:
        count, rounds = 24, 1
    counts, states = ((1,), ("cold",)) if quick else ((1, 2), ("cold", "warm"))
    names = [f"{workers} {state}" for workers in counts for state in states]
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    texts = set()
    for number in track(range(rounds)):
        for workers in counts:
            with tempfile.TemporaryDirectory() as folder:
                root = Path(folder)
                prompts(root / "prompts.jsonl", count)
                for state in states:
                    made = root / f"{state}.jsonl"
                    figures = run(
                        workers, root / "prompts.jsonl", made, root / "cache", batch, quick
                    )
                    runs[f"{workers} {state}"].append(figures)
                    texts.add(made.read_text())
                    print(number, workers, state, figures, flush=True)
    report = {
        "python": platform.python_version(), "torch": torch.__version__,
        "transformers": transformers.__version__, "machine": cpu(),
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
        "cost": cost(),
    }  # fmt: skip
    if out is not None:
        out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
