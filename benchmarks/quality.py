"""Exact match of the tiny models, dense and with FOCUS, at equal thresholds.

    python -m benchmarks.quality --n 1000 --out docs/quality.json
    python -m benchmarks.quality --n 200 --batch 200 --only dense --only "focus, alpha 1.5, written"
        --only "focus, by default" --out docs/safeguards.json
    python -m benchmarks.quality --quick

Writes JSON; ``docs/quality.md`` is made from it by ``python -m docs.build``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.progress import Progress
from transformers import AutoTokenizer, Qwen3ForCausalLM

import focus_compile
from benchmarks.contest import PAPER
from benchmarks.provenance import commit, cpu

ROOT = Path(__file__).resolve().parent.parent
ALPHAS = (1.5, 2.0, 4.0)
CHECKPOINTS = ("checkpoint", "aligned_checkpoint")
LAYER_0 = focus_compile.Signal((1.0, 0.0))
DEFAULT = "focus, by default"
"""With what ``generate`` does unless it is told otherwise; all others run in the paper's way."""
sys.path.insert(0, str(ROOT / "examples" / "tiny_dllm"))
from tasks import TASK_BY_NAME, Example, examples  # noqa: E402


def main(
    n: int = 1000,
    batch: int = 125,
    seed: int = 1,
    threads: int = 2,
    threshold: float = 0.9,
    out: Path | None = None,
    only: Annotated[list[str] | None, typer.Option(help="some contestants")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="dense and the defaults, 8 prompts")
    ] = False,
) -> None:
    """Decode ``n`` prompts per task with every contestant."""
    torch.set_num_threads(threads)
    if quick:
        n, only = 8, ["dense", DEFAULT]
    elif out is None:
        out = ROOT / "docs" / "quality.json"
    rows: list[dict[str, Any]] = []
    for checkpoint in CHECKPOINTS:
        rows += _measure(checkpoint, n, batch, seed, threshold, only or [])
    report = {
        "n": n,
        "batch": batch,
        "threshold": threshold,
        "threads": threads,
        "dtype": "torch.float32",
        "commit": commit(),
        "cpu": cpu(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "rows": rows,
    }
    if out is not None:
        out.write_text(json.dumps(report, indent=1) + "\n")


def _measure(
    checkpoint: str, n: int, batch: int, seed: int, threshold: float, only: list[str]
) -> list[dict[str, Any]]:
    """Rows of one checkpoint; ``only``: of these contestants, or, empty, of all."""
    folder = ROOT / "examples" / "tiny_dllm" / checkpoint
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = Qwen3ForCausalLM.from_pretrained(folder).eval()
    options = {"mask_token_id": tokenizer.mask_token_id, "strict": True}
    focus = torch.compile(model, backend="focus", dynamic=True, options=options)
    contestants: dict[str, tuple[Any, dict[str, Any]]] = {"dense": (model, {})}
    for visibility in ("written", "prefix"):
        for alpha in ALPHAS:
            settings = {"alpha": alpha, "visibility": visibility}
            contestants[f"focus, alpha {alpha:g}, {visibility}"] = (focus, settings)
    contestants["focus, alpha 1.5, random signal"] = (focus, {"signal": random_signal})
    contestants["focus, alpha 1.5, layer 0 alone"] = (focus, {"signal": LAYER_0})
    contestants[DEFAULT] = (focus, {"first_step": None, "rescue": "auto"})
    contestants = {name: each for name, each in contestants.items() if not only or name in only}
    rows: list[dict[str, Any]] = []
    with Progress() as bar:
        job = bar.add_task("decoding", total=len(contestants) * len(TASK_BY_NAME) * n)
        for name, (contestant, settings) in contestants.items():
            for task in TASK_BY_NAME:
                torch.manual_seed(0)
                drawn = examples(task, n, seed)
                row = _row(contestant, tokenizer, drawn, settings, batch, threshold, bar, job)
                setting: dict[str, Any] = {"checkpoint": checkpoint}
                setting |= {
                    "alpha": settings.get("alpha"),
                    "visibility": settings.get("visibility"),
                }
                rows.append({"contestant": name, "task": task, **setting, **row})
                bar.console.print(rows[-1])
    return rows


def random_signal(step: focus_compile.Step) -> focus_compile.Signal:
    return focus_compile.Signal((0.0, 0.0), torch.rand(step.masked.shape))


def decoded_batches(
    model: Any,
    tokenizer: Any,
    drawn: Sequence[Example],
    batch: int,
    settings: Mapping[str, Any],
    **options: Any,
) -> Iterator[tuple[focus_compile.Generated, list[bool]]]:
    """Generations of examples, and which rows hold the right answer.

    ``settings``: of a session for each; ``options``: of ``generate``.
    """
    for start in range(0, len(drawn), batch):
        part = drawn[start : start + batch]
        texts = [example.prompt for example in part]
        inputs = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
        with focus_compile.session(**settings):
            made = focus_compile.generate(
                model,
                inputs["input_ids"],
                inputs["attention_mask"],
                mask_token_id=tokenizer.mask_token_id,
                eos_token_id=tokenizer.eos_token_id,
                return_dict=True,
                **options,
            )
        answers = made.sequences[:, inputs["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
        yield made, [text == want.answer for text, want in zip(texts, part, strict=True)]


def _row(
    model: Any,
    tokenizer: Any,
    drawn: list[Example],
    settings: dict[str, Any],
    batch: int,
    threshold: float,
    bar: Progress,
    job: Any,
) -> dict[str, Any]:
    right = steps = blocks = decoded = focus_steps = forwards = rescued = 0
    fed: list[float] = []
    retained: list[float] = []
    options = {"confidence_threshold": threshold, "max_new_tokens": 96}
    for result, good in decoded_batches(
        model, tokenizer, drawn, batch, PAPER | settings, **options
    ):
        right += sum(good)
        steps += sum(int(count.sum()) for count in result.steps_per_block)
        blocks += sum(int((count > 0).sum()) for count in result.steps_per_block)
        decoded += result.decoded
        forwards += result.forwards
        focus_steps += result.focus_steps
        rescued += result.rescued_rows
        fed.append(result.fed_fraction * result.forwards)
        retained.append(result.retained_fraction * result.forwards)
        bar.advance(job, len(good))
    return {
        "exact_match": right / len(drawn),
        "steps_per_block": steps / blocks,
        "decoded_per_step": decoded / steps,
        "fed_fraction": sum(fed) / forwards,
        "retained_fraction": sum(retained) / forwards,
        "focus_steps": focus_steps,
        "forwards": forwards,
        "row_steps": steps,
        "rescued_rows": rescued,
    }


if __name__ == "__main__":
    typer.run(main)
