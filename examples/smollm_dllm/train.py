"""Make the base a block-diffusion LLM: train the adapter, with blocks of 16, then of 32.

    python examples/smollm_dllm/train.py --work WORK_FOLDER --out ADAPTER_FOLDER

On a GPU add ``--device cuda`` (bf16) and, if it pays, ``--compile``. Interrupt it at any time: the
same command goes on from the last checkpoint, at most a minute old. ``--export`` trains nothing: it
writes the adapter of the last checkpoint.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import layout
import torch
import typer
from adapted import BLOCK_LENGTH, build_tokenizer, load_base, with_adapter
from questions import TASKS
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

console = Console(stderr=True)
HEAP = {"MALLOC_MMAP_THRESHOLD_": 2**32, "MALLOC_TRIM_THRESHOLD_": 2**32, "MALLOC_TOP_PAD_": 2**28}


@dataclass(frozen=True)
class Settings:
    """What the result depends on, beside the machine; written beside the adapter."""

    seed: int = 0
    steps: int = 600
    wide_from: int = 80  # steps before have blocks of 16 tokens
    batch: int = 8
    rank: int = 24
    alpha: float = 32.0
    rate: float = 1e-3
    mask_rate: float = 2e-3
    warmup: int = 20
    clip: float = 1.0

    def factor(self, step: int) -> float:
        """Of the rates: linear decay, to 0 behind the last step."""
        return min((step + 1) / self.warmup, 1.0) * (1 - step / self.steps)

    def block(self, step: int) -> int:
        return BLOCK_LENGTH // 2 if step < self.wide_from else BLOCK_LENGTH

    def batch_of(self, step: int, tokenizer: Any) -> layout.Batch:
        """The same whether training was interrupted or not."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        examples = layout.drawn(self.seed, step, self.batch, tokenizer)
        return layout.diffusion(examples, tokenizer, self.block(step), generator)


def keep_heap() -> None:
    """Start anew with a C library that keeps memory: else steps on a CPU spend it on page faults.

    It reads these variables before Python runs.
    """
    wanted = {name: str(value) for name, value in HEAP.items()}
    if sys.platform == "linux" and any(name not in os.environ for name in wanted):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**wanted, **os.environ})


def optimizer_of(model: nn.Module, settings: Settings) -> torch.optim.AdamW:
    """The mask's row is faster than the matrices."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rows = [p for name, p in trained.items() if "trainable_tokens" in name]
    matrices = [p for name, p in trained.items() if "trainable_tokens" not in name]
    groups = [
        {"params": matrices, "initial": settings.rate},
        {"params": rows, "initial": settings.mask_rate},
    ]
    return torch.optim.AdamW(groups, lr=settings.rate, betas=(0.9, 0.98), weight_decay=0.0)


def loss_of(model: nn.Module, head: nn.Module, batch: layout.Batch) -> tuple[Tensor, Tensor]:
    """Loss, and which trained positions are right; logits are made of those alone."""
    hidden = model(
        input_ids=batch.ids,
        attention_mask=batch.visible,
        position_ids=batch.positions,
        use_cache=False,
    ).last_hidden_state
    trained = batch.weights > 0
    logits = head(hidden[trained]).float()
    targets, weights = batch.targets[trained], batch.weights[trained]
    loss = (cross_entropy(logits, targets, reduction="none") * weights).sum() / weights.sum()
    return loss, logits.detach().argmax(-1) == targets


def train_step(
    model: nn.Module,
    head: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: layout.Batch,
    *,
    factor: float,
    clip: float,
    bf16: bool,
) -> dict[str, float]:
    """One step; returns the loss and each task's share of right tokens."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial"] * factor
    with torch.autocast(batch.ids.device.type, torch.bfloat16, enabled=bf16):
        loss, right = loss_of(model, head, batch)
    optimizer.zero_grad()
    loss.backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, clip)
    optimizer.step()
    record = {"loss": loss.item(), "norm": norm.item()}
    trained = batch.weights > 0
    task = batch.task[:, None].expand_as(trained)[trained]
    for index, name in enumerate(TASKS):
        if (task == index).any():
            record[name] = right[task == index].float().mean().item()
    return record


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def save_state(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Whole or not at all."""
    state = {"model": trained_state(model), "optimizer": optimizer.state_dict(), "step": step}
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def restore(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """The step to go on from."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True, map_location="cpu")
    missing, unknown = model.load_state_dict(state["model"], strict=False)
    if unknown or set(trained_state(model)) & set(missing):
        raise SystemExit(f"{path} is of other settings: remove it, or give them")
    optimizer.load_state_dict(state["optimizer"])
    step: int = state["step"]
    console.log(f"going on from step {step}")
    return step


def agree(path: Path, settings: Settings) -> None:
    """Note the settings at the first start; a training goes on with the same ones.

    Raises:
        SystemExit: they differ.
    """
    given = asdict(settings)
    before = json.loads(path.read_text()) if path.exists() else given
    if before != given:
        other = sorted(name for name in given if before.get(name) != given[name])
        raise SystemExit(f"{path.parent} was begun with other settings: {', '.join(other)}")
    path.write_text(json.dumps(given, indent=2) + "\n")


def steps_logged(log: Path, done: int) -> Iterator[str]:
    """Lines of the steps that are not run again."""
    if log.exists():
        for line in log.read_text().splitlines(keepends=True):
            if line.endswith("\n") and json.loads(line)["step"] < done:
                yield line


def export(model: Any, tokenizer: Any, settings: Settings, out: Path, step: int) -> None:
    """The adapter in bf16, its tokenizer, and what it was made with."""
    model.save_pretrained(out, save_embedding_layers=False)
    tokenizer.save_pretrained(out)
    weights = out / "adapter_model.safetensors"
    state = {name: value.to(torch.bfloat16) for name, value in load_file(weights).items()}
    save_file(state, weights, metadata={"format": "pt"})
    weights.chmod(0o644)
    config = json.loads((out / "adapter_config.json").read_text())
    config["target_modules"].sort()  # a set, in peft
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    made = {**asdict(settings), "trained_steps": step, "torch": torch.__version__}
    (out / "settings.json").write_text(json.dumps(made, indent=2) + "\n")
    (out / "README.md").unlink(missing_ok=True)  # peft's empty card
    console.log(f"wrote {out}: {weights.stat().st_size / 1e6:.1f} MB after step {step}")


def main(
    *,
    work: Annotated[Path, typer.Option(help="folder of the checkpoint and of the log")],
    out: Annotated[Path | None, typer.Option(help="folder of the adapter")] = None,
    device: str = "cpu",
    threads: int = 1,
    steps: int = Settings.steps,
    wide_from: int = Settings.wide_from,
    batch: int = Settings.batch,
    rank: int = Settings.rank,
    rate: Annotated[float, typer.Option(help="of the matrices")] = Settings.rate,
    mask_rate: Annotated[float, typer.Option(help="of the mask's row")] = Settings.mask_rate,
    seed: int = Settings.seed,
    save_seconds: float = 60.0,
    bf16: Annotated[bool | None, typer.Option(help="autocast; by default on a GPU only")] = None,
    compile_model: Annotated[bool, typer.Option("--compile", help="torch.compile")] = False,
    export_only: Annotated[bool, typer.Option("--export", help="train nothing")] = False,
) -> None:
    """Train the adapter, from the last checkpoint if there is one, and write it."""
    keep_heap()
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    work.mkdir(parents=True, exist_ok=True)
    settings = Settings(
        seed=seed,
        steps=steps,
        wide_from=wide_from,
        batch=batch,
        rank=rank,
        rate=rate,
        mask_rate=mask_rate,
    )
    agree(work / "settings.json", settings)
    tokenizer = build_tokenizer()
    peft = with_adapter(load_base(), tokenizer.mask_token_id, settings.rank, settings.alpha)
    peft.to(device)
    optimizer = optimizer_of(peft, settings)
    path, log = work / "checkpoint.pt", work / "log.jsonl"
    done = restore(path, peft, optimizer)
    if not export_only:
        log.write_text("".join(list(steps_logged(log, done))))
        base = peft.get_base_model()
        body = torch.compile(base.model, dynamic=True) if compile_model else base.model
        lower = device != "cpu" if bf16 is None else bf16
        saved = time.monotonic()
        with log.open("a") as lines, ThreadPoolExecutor(1) as ahead:
            after = ahead.submit(settings.batch_of, done, tokenizer)
            for step in range(done, settings.steps):
                start = time.perf_counter()
                fed = after.result()
                after = ahead.submit(settings.batch_of, step + 1, tokenizer)
                record = train_step(
                    body,
                    base.lm_head,
                    optimizer,
                    fed.to(device),
                    factor=settings.factor(step),
                    clip=settings.clip,
                    bf16=lower,
                )
                told = {name: round(value, 5) for name, value in record.items()}
                spent = round(time.perf_counter() - start, 2)
                size = {"block": settings.block(step), "positions": fed.ids.numel(), "s": spent}
                lines.write(json.dumps({"step": step, **size, **told}) + "\n")
                lines.flush()
                done = step + 1
                if time.monotonic() - saved > save_seconds or done == settings.steps:
                    save_state(path, peft, optimizer, done)
                    saved = time.monotonic()
    if out is not None:
        export(peft, tokenizer, settings, out, done)


if __name__ == "__main__":
    typer.run(main)
