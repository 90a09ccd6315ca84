"""Dense decoding of held-out prompts: exact match, and tokens decoded per step.

    python examples/smollm_dllm/evaluate.py --n 40

``train-like`` prompts are new draws from the texts, names and numbers of training; ``held-out``
ones have other templates throughout, half of their names or more are new, and so are the numbers.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from adapted import ADAPTER, BLOCK_LENGTH, build_tokenizer, load, load_base, with_adapter
from peft import PeftModel
from questions import TASKS, Example, examples
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from focus_compile import generate
from focus_compile.generation.text import answers as texts_of
from focus_compile.generation.text import left_padded

SETS = {"train-like": False, "held-out": True}
SEED = "test"  # training draws with numbers


def measure(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    asked: list[Example],
    *,
    threshold: float,
    block: int,
    batch: int,
) -> tuple[dict[str, float], list[str]]:
    """Figures of one task, and the answers.

    ``tokens_per_step`` counts a step for each row that still has masks, as if each prompt had been
    decoded alone; end-of-text tokens that fill the block count, for they are decoded, too.
    """
    order = sorted(range(len(asked)), key=lambda i: len(tokenizer.encode(asked[i].prompt)))
    texts = [""] * len(asked)
    tokens = steps = 0
    start = time.perf_counter()
    for at in range(0, len(order), batch):
        rows = order[at : at + batch]
        ids, real = left_padded([tokenizer.encode(asked[i].prompt) for i in rows])
        out = generate(
            model,
            ids.to(model.device),
            real.to(model.device),
            max_new_tokens=BLOCK_LENGTH,
            block_length=block,
            mask_token_id=tokenizer.mask_token_id,
            eos_token_id=tokenizer.eos_token_id,
            confidence_threshold=threshold,
            return_dict=True,
        )
        made: Tensor = out.sequences[:, ids.shape[1] :]
        for i, text in zip(rows, texts_of(tokenizer, made), strict=True):
            texts[i] = text
        tokens += out.decoded
        steps += int(sum(of_rows.sum() for of_rows in out.steps_per_block))
    right = [text == example.answer for text, example in zip(texts, asked, strict=True)]
    figures = {
        "exact": round(sum(right) / len(right), 4),
        "tokens_per_step": round(tokens / steps, 2),
        "steps": round(steps / len(asked), 1),
        "n": len(asked),
        "seconds": round(time.perf_counter() - start, 1),
    }
    return figures, texts


def from_checkpoint(path: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The model of a training's checkpoint, which need not be finished."""
    tokenizer = build_tokenizer()
    settings = json.loads((path.parent / "settings.json").read_text())
    peft = with_adapter(load_base(), tokenizer.mask_token_id, settings["rank"], settings["alpha"])
    state: dict[str, Any] = torch.load(path, weights_only=True)
    _, unknown = peft.load_state_dict(state["model"], strict=False)
    if unknown:
        raise SystemExit(f"{path} has other matrices: {unknown[:3]}")
    typer.echo(f"step {state['step']}", err=True)
    assert isinstance(peft, PeftModel)
    return peft.merge_and_unload().eval(), tokenizer


def main(
    *,
    adapter: Path = ADAPTER,
    checkpoint: Annotated[Path | None, typer.Option(help="of a training, not the adapter")] = None,
    n: Annotated[int, typer.Option(help="prompts of each task and set")] = 40,
    task: Annotated[list[str] | None, typer.Option(help="some tasks only")] = None,
    sets: Annotated[list[str] | None, typer.Option("--set", help="one set only")] = None,
    threshold: float = 0.9,
    block: int = BLOCK_LENGTH,
    batch: int = 8,
    threads: int = 1,
    device: str = "cpu",
    show: Annotated[int, typer.Option(help="answers to print")] = 0,
    out: Annotated[Path | None, typer.Option(help="JSON file of the figures")] = None,
) -> None:
    """Print a line of figures per task and set."""
    torch.set_num_threads(threads)
    model, tokenizer = from_checkpoint(checkpoint) if checkpoint else load(adapter)
    model.to(device)
    report: dict[str, dict[str, dict[str, float]]] = {}
    for name in sets or SETS:
        for known in task or TASKS:
            asked = examples([known], n, SEED, tokenizer, held=SETS[name])
            figures, texts = measure(
                model, tokenizer, asked, threshold=threshold, block=block, batch=batch
            )
            report.setdefault(name, {})[known] = figures
            told = " ".join(f"{key} {value}" for key, value in figures.items())
            typer.echo(f"{name:10} {known:8} {told}")
            for example, text in list(zip(asked, texts, strict=True))[:show]:
                typer.echo(
                    f"    {example.question}\n    wanted {example.answer}\n    made   {text}"
                )
    if out is not None:
        settings = {"threshold": threshold, "block": block, "torch": torch.__version__}
        out.write_text(json.dumps({**settings, "sets": report}, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
