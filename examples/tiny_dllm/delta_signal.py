"""Does the change of importance from layer 0 to layer 1 tell which tokens a step will decode?

    python delta_signal.py --steps 2000 --plot ../../docs/tiny_dllm_signal.png

Dense decoding visits its own steps; at each one the masked tokens are scored four ways and the
scores are held against what the step decoded: AUC, and recall of the K best, K = ceil(1.5 average).
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Annotated

import matplotlib
import torch
import typer
from decode import ALIGNED, CHECKPOINT, decode, load
from delta import Watch
from rich.console import Console
from rich.progress import Progress, TaskID
from tasks import TASKS, examples
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

ALPHA = 1.5
MOST_PROMPTS = 3200  # a task that decodes nearly all at once has few steps to judge
SCORES = ("delta", "importance of layer 0", "leftmost first", "random")
console = Console(stderr=True)


def auc(score: Tensor, hit: Tensor) -> float:
    """Chance that a decoded token scores above one that is not; ties count a half."""
    gap = score[hit][:, None] - score[~hit][None, :]
    return ((gap > 0).float() + 0.5 * (gap == 0).float()).mean().item()


class Recorder:
    """Holds the scores of masked tokens against what every denoising step decodes."""

    def __init__(self, watch: Watch, seed: int) -> None:
        self.watch = watch
        self.auc: dict[str, list[float]] = defaultdict(list)
        self.recall: dict[str, list[float]] = defaultdict(list)
        self.steps = 0  # all denoising steps seen, also those with nothing to tell apart
        self.targets: list[float] = []  # K / m of the steps behind `recall`
        self.ceiling: list[float] = []  # the recall of a perfect score, there
        self.generator = torch.Generator().manual_seed(seed)
        self.totals: dict[int, tuple[int, int]] = {}  # row -> tokens decoded, steps, in this block

    def __call__(self, masked: Tensor, decoded: Tensor) -> None:
        first, second = self.watch.importances(masked)
        for row in masked.any(1).nonzero()[:, 0].tolist():
            which = masked[row].nonzero()[:, 0]
            if len(which) == masked.shape[1]:
                self.totals[row] = (0, 0)  # a block starts
            hit, earlier, later = decoded[row, which], first[row, which], second[row, which]
            noise = torch.rand(len(which), generator=self.generator)
            self._judge(row, hit, (later - earlier, earlier, -which.float(), noise))
            tokens, steps = self.totals[row]
            self.totals[row] = (tokens + int(hit.sum()), steps + 1)

    def _judge(self, row: int, hit: Tensor, scores: tuple[Tensor, ...]) -> None:
        self.steps += 1
        if hit.all():
            return  # nothing to tell apart
        tokens, steps = self.totals[row]
        average = tokens / steps if steps else 1.0
        target = min(len(hit), max(1, math.ceil(max(average, 1.0) * ALPHA)))
        for name, score in zip(SCORES, scores, strict=True):
            self.auc[name].append(auc(score, hit))
            if target < len(hit):
                best = score.argsort(descending=True, stable=True)[:target]
                self.recall[name].append((hit[best].sum() / hit.sum()).item())
        if target < len(hit):
            self.targets.append(target / len(hit))
            self.ceiling.append(min(1.0, target / int(hit.sum())))


def judge(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    task: str,
    steps: int,
    seed: int,
    batch: int,
    show: Callable[[int], None],
) -> dict[str, object]:
    """One task's figures, over `steps` judged steps or MOST_PROMPTS prompts."""
    prompts = [example.prompt for example in examples(task, MOST_PROMPTS, seed)]
    at = 0
    with Watch(model) as watch:
        recorder = Recorder(watch, seed)
        while len(recorder.recall["delta"]) < steps and at < len(prompts):
            decode(model, tokenizer, prompts[at : at + batch], observe=recorder)
            at += batch
            show(min(steps, len(recorder.recall["delta"])))
    return {
        "prompts": at,
        "steps": recorder.steps,
        "auc_steps": len(recorder.auc["delta"]),
        "recall_steps": len(recorder.recall["delta"]),
        "k_share_of_masked": fmean(recorder.targets),
        "best_possible_recall": fmean(recorder.ceiling),
        "auc": {name: fmean(values) for name, values in recorder.auc.items()},
        "recall_at_k": {name: fmean(values) for name, values in recorder.recall.items()},
    }


def plot(report: dict[str, dict], path: Path) -> None:
    """A row per checkpoint, two panels of bars in it: AUC and recall at K, per task."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = (10, 3.4 * len(report))
    figure, rows = pyplot.subplots(len(report), 2, figsize=size, sharey=True, squeeze=False)
    titles = {"auc": "AUC", "recall_at_k": f"recall at K = ceil({ALPHA} average)"}
    for panels, (checkpoint, figures) in zip(rows, report.items(), strict=True):
        for panel, (kind, title) in zip(panels, titles.items(), strict=True):
            for index, score in enumerate(SCORES):
                heights = [figures[task.name][kind][score] for task in TASKS]
                at = [position + 0.2 * index - 0.3 for position in range(len(TASKS))]
                panel.bar(at, heights, width=0.19, label=score)
            panel.set_xticks(range(len(TASKS)), [task.name for task in TASKS])
            panel.set_title(f"{checkpoint}: {title}")
            panel.set_ylim(0, 1)
            panel.axhline(0.5, color="grey", linewidth=0.5)
    rows[0, 1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(
    *,
    steps: Annotated[int, typer.Option(min=1, help="judged steps per task")] = 2000,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    seed: int = 2,
    batch: Annotated[int, typer.Option(min=1)] = 32,
    checkpoint: Annotated[
        list[Path] | None, typer.Option(help="may be given several times; both if none")
    ] = None,
    plot_path: Annotated[Path | None, typer.Option("--plot", help="PNG file")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file; standard output if none")] = None,
) -> None:
    """Score the masked tokens of `steps` steps per task, or of 3200 prompts; write JSON.

    A step is judged if it leaves a token undecoded and K does not already cover all of them.
    """
    torch.set_num_threads(threads)
    report: dict[str, dict] = {}
    with Progress(console=console) as bar:
        for folder in checkpoint or (CHECKPOINT, ALIGNED):
            try:
                model, tokenizer = load(folder)
            except FileNotFoundError as error:
                console.print(f"[red]{error}")
                raise typer.Exit(2) from error
            report[folder.name] = {}
            for task in TASKS:
                row = bar.add_task(f"{folder.name} {task.name}", total=steps)
                show = partial(_show, bar, row)
                figures = judge(model, tokenizer, task.name, steps, seed, batch, show)
                report[folder.name][task.name] = figures
    if plot_path is not None:
        plot(report, plot_path)
    text = json.dumps(report, indent=2)
    if out is None:
        typer.echo(text)
    else:
        out.write_text(text + "\n")


def _show(bar: Progress, row: TaskID, completed: int) -> None:
    bar.update(row, completed=completed)


if __name__ == "__main__":
    typer.run(main)
