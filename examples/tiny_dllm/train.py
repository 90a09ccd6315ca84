"""Train the model from scratch: autoregressive, then block diffusion with blocks of 1, then 32.

    python train.py --work WORK_FOLDER --out checkpoint --aligned-out aligned_checkpoint

The last, short stage trains the importance delta to point at decodable tokens; it makes the second
checkpoint. Interrupt it at any time; the same command goes on from the last saved state.
"""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import batches
import torch
import typer
from delta import Watch, alignment
from language import BLOCK_LENGTH, build_model, build_tokenizer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from tasks import TASKS
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

console = Console(stderr=True)


@dataclass(frozen=True)
class Stage:
    """One stage: its name is also part of the seed of its batches."""

    name: str
    steps: int
    rate: float
    warmup: int = 50
    decay: float = 0.3  # the last part of the stage, over which the rate falls to 5 %
    grow: tuple[int, int] = (0, 0)  # only short examples before, all lengths after these steps
    shortest: float = 0.0
    mix: tuple[float, ...] = (1.0,) * len(TASKS)
    easiest: tuple[float, ...] = (0.0, -1.0, 0.0)  # each task's size at the start of the growth
    align: float = 0.0  # weight of the alignment loss

    def rate_at(self, step: int) -> float:
        left = (self.steps - step) / (self.decay * self.steps) if self.decay else 1.0
        return self.rate * min((step + 1) / self.warmup, 1.0, 0.05 + 0.95 * left)

    def longest_at(self, step: int) -> float:
        first, last = self.grow
        return 1.0 if step >= last else max(0.0, (step - first) / (last - first))


def make_batch(
    stage: Stage,
    step: int,
    tokenizer: PreTrainedTokenizerFast,
    *,
    seed: int,
    size: int,
    copies: int,
) -> batches.Batch:
    """The batch of a step, the same whether training was interrupted or not."""
    sizes = (stage.shortest, stage.longest_at(step))
    drawn = batches.draw(f"{stage.name}/{seed}/{step}", size, sizes, stage.mix, stage.easiest)
    if stage.name in ("autoregressive", "additions"):
        return batches.autoregressive(drawn, tokenizer)
    if stage.name == "pointwise":
        return batches.pointwise(drawn, tokenizer)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    return batches.diffusion(drawn, tokenizer, generator, copies)


def alignment_loss(
    watch: Watch, logits: Tensor, batch: batches.Batch, copies: int, threshold: float = 0.9
) -> Tensor:
    """Holds the delta against what dense decoding would decode of the noised blocks now."""
    length = copies * BLOCK_LENGTH
    masked = batch.weights[:, -length:] > 0
    first, second = watch.importances(masked, copies)
    confidence = logits[:, -length:].detach().float().softmax(-1).amax(-1)
    confidence = confidence.masked_fill(~masked, -1.0).view(-1, BLOCK_LENGTH)
    sure = confidence >= threshold
    surest = confidence == confidence.amax(1, keepdim=True)
    decoded = torch.where(sure.any(1, keepdim=True), sure, surest)
    return alignment((second - first).view_as(decoded), masked.view_as(decoded), decoded)


def train_step(
    model: Qwen3ForCausalLM,
    optimizer: torch.optim.Optimizer,
    batch: batches.Batch,
    bf16: bool,
    align: float = 0.0,
    copies: int = 1,
) -> dict[str, float]:
    """One optimizer step; returns the loss and each task's token accuracy on what was trained."""
    lower = torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext()
    with lower, Watch(model) as watch:
        logits = model(
            input_ids=batch.ids,
            attention_mask=batch.visible,
            position_ids=batch.positions,
            use_cache=False,
        ).logits
    aligned = alignment_loss(watch, logits, batch, copies) if align else None
    trained = batch.weights > 0
    logits, targets = logits[trained].float(), batch.targets[trained]
    weights = batch.weights[trained]
    loss = (cross_entropy(logits, targets, reduction="none") * weights).sum() / weights.sum()
    record = {"loss": loss.item()}
    if aligned is not None:
        record["alignment"] = aligned.item()
        loss = loss + align * aligned
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    right = logits.argmax(-1) == targets
    task = batch.task[:, None].expand_as(trained)[trained]
    for index, known in enumerate(TASKS):
        counted = (task == index) & (weights == 1.0)
        if counted.any():
            record[known.name] = right[counted].float().mean().item()
    return record


def forget(log: Path, stage: str, done: int) -> None:
    """Drop the log lines of steps that will be run again."""
    if not log.exists():
        return
    lines = log.read_text().splitlines(keepends=True)
    records = [json.loads(line) for line in lines]
    kept = [r["stage"] != stage or r["step"] < done for r in records]
    log.write_text("".join(line for line, keep in zip(lines, kept, strict=True) if keep))


def run_stage(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    stage: Stage,
    *,
    work: Path,
    seed: int,
    size: int,
    copies: int,
    bf16: bool,
    save_every: int,
) -> None:
    """Train one stage, from its last saved state if there is one."""
    state_path = work / f"{stage.name}.pt"
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=stage.rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    done, seconds = 0, 0.0
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        done, seconds = state["step"], state["seconds"]
        console.log(f"{stage.name}: going on from step {done}")
    forget(work / "log.jsonl", stage.name, done)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as bar, (work / "log.jsonl").open("a") as log:
        row = bar.add_task(stage.name, total=stage.steps, completed=done, note="")
        for step in range(done, stage.steps):
            start = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = stage.rate_at(step)
            batch = make_batch(stage, step, tokenizer, seed=seed, size=size, copies=copies)
            record = train_step(model, optimizer, batch, bf16, stage.align, copies)
            seconds += time.perf_counter() - start
            log.write(
                json.dumps({"stage": stage.name, "step": step, "s": seconds, **record}) + "\n"
            )
            log.flush()
            bar.update(row, advance=1, note=" ".join(f"{k} {v:.3f}" for k, v in record.items()))
            if (step + 1) % save_every == 0 or step + 1 == stage.steps:
                saved = {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "step": step + 1,
                    "seconds": seconds,
                }
                torch.save(saved, state_path.with_suffix(".tmp"))
                state_path.with_suffix(".tmp").replace(state_path)


def main(
    *,
    work: Annotated[Path, typer.Option(help="folder of states and of the loss log")],
    out: Annotated[Path, typer.Option(help="folder of the finished checkpoint")],
    aligned_out: Annotated[Path, typer.Option(help="folder of the aligned checkpoint")],
    seed: int = 0,
    threads: int = 1,
    layers: int = 8,
    width: int = 128,
    batch: int = 64,
    copies: Annotated[int, typer.Option(help="noised versions of each sampled block")] = 2,
    autoregressive_steps: int = 600,
    additions_steps: int = 260,
    pointwise_steps: int = 80,
    diffusion_steps: int = 280,
    polish_steps: int = 300,
    align_steps: int = 50,
    save_every: int = 50,
    bf16: Annotated[bool, typer.Option(help="autocast matrix products to bfloat16")] = True,
) -> None:
    """Train all stages and write both checkpoints in Hugging Face format."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    model = build_model(layers, width)
    model.train()

    def run(*stages: Stage) -> None:
        for stage in stages:
            run_stage(
                model,
                tokenizer,
                stage,
                work=work,
                seed=seed,
                size=batch,
                copies=copies,
                bf16=bf16,
                save_every=save_every,
            )

    def save(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        console.log(f"wrote {folder}")

    longer, mix = 0.2, (0.4, 0.45, 0.15)
    run(
        Stage("autoregressive", autoregressive_steps, rate=2e-3, grow=(200, 450)),
        Stage(
            "additions",
            additions_steps,
            rate=2e-3,
            grow=(40, 180),
            mix=(0.7, 0.2, 0.1),
            easiest=(-1.0, -1.0, 0.0),
        ),
        Stage("pointwise", pointwise_steps, rate=1.5e-3, decay=0.1),
        Stage("diffusion", diffusion_steps, rate=1.5e-3, decay=0.0),
        Stage("polish", polish_steps, rate=1.5e-3, decay=1.0, shortest=longer, mix=mix),
    )
    save(out)
    run(
        Stage(
            "align",
            align_steps,
            rate=1e-3,
            warmup=20,
            decay=1.0,
            shortest=longer,
            mix=mix,
            align=0.1,
        ),
    )
    save(aligned_out)


if __name__ == "__main__":
    typer.run(main)
