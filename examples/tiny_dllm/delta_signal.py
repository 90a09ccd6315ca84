"""Does the change of importance from layer 0 to layer 1 tell which tokens a step will decode?

    python delta_signal.py --steps 2000 --plot ../../docs/tiny_dllm_signal.png

Dense decoding visits its own steps; at each one the masked tokens are scored four ways and the
scores are held against what the step decoded: AUC, and recall of the K best, K = ceil(1.5 average).
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Annotated

import matplotlib
import torch
import typer
from decode import CHECKPOINT, decode, load
from rich.console import Console
from rich.progress import Progress
from tasks import TASKS, examples
from torch import Tensor
from torch.nn.functional import max_pool1d
from transformers import Qwen3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

ALPHA = 1.5
MOST_PROMPTS = 3200  # a task that decodes nearly all at once has few steps to judge
SCORES = ("delta", "importance of layer 0", "leftmost first", "random")
console = Console(stderr=True)


def importance(q_HMD: Tensor, k_GMD: Tensor, scale: float) -> Tensor:
    """How much attention each masked token gets from the masked tokens of its row; [M]."""
    heads = q_HMD.shape[0]
    k_HMD = k_GMD.repeat_interleave(heads // k_GMD.shape[0], 0)
    scores = scale * q_HMD.float() @ k_HMD.float().transpose(1, 2)
    pooled = max_pool1d(scores, kernel_size=3, stride=1, padding=1)  # pads with -inf
    return pooled.softmax(-1).sum((0, 1))


def auc(score: Tensor, hit: Tensor) -> float:
    """Chance that a decoded token scores above one that is not; ties count a half."""
    gap = score[hit][:, None] - score[~hit][None, :]
    return ((gap > 0).float() + 0.5 * (gap == 0).float()).mean().item()


class Recorder:
    """Sees q and k of layers 0 and 1 of every forward, and every denoising step's outcome."""

    def __init__(self, model: Qwen3ForCausalLM, seed: int) -> None:
        self.seen: dict[str, Tensor] = {}
        self.rotary: tuple[Tensor, Tensor] | None = None
        self.auc: dict[str, list[float]] = defaultdict(list)
        self.recall: dict[str, list[float]] = defaultdict(list)
        self.steps = 0  # all denoising steps seen, also those with nothing to tell apart
        self.targets: list[float] = []  # K / m of the steps behind `recall`
        self.ceiling: list[float] = []  # the recall of a perfect score, there
        self.generator = torch.Generator().manual_seed(seed)
        self.totals: dict[int, tuple[int, int]] = {}  # row -> tokens decoded, steps, in this block
        self.scale = model.model.layers[0].self_attn.scaling
        self.handles = [model.model.rotary_emb.register_forward_hook(self._see_rotary)]
        for layer in (0, 1):
            attention = model.model.layers[layer].self_attn
            for name, norm in (("q", attention.q_norm), ("k", attention.k_norm)):
                self.handles.append(norm.register_forward_hook(self._see(f"{name}{layer}")))

    def _see(self, name: str):
        def hook(_module: torch.nn.Module, _inputs: tuple, output: Tensor) -> None:
            self.seen[name] = output.transpose(1, 2)

        return hook

    def _see_rotary(self, _module: torch.nn.Module, _inputs: tuple, output: tuple) -> None:
        self.rotary = output

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()

    def __call__(self, masked: Tensor, decoded: Tensor) -> None:
        assert self.rotary is not None
        pairs = [
            apply_rotary_pos_emb(self.seen[f"q{i}"], self.seen[f"k{i}"], *self.rotary)
            for i in (0, 1)
        ]
        for row in masked.any(1).nonzero()[:, 0].tolist():
            which = masked[row].nonzero()[:, 0]
            if len(which) == masked.shape[1]:
                self.totals[row] = (0, 0)  # a block starts
            hit = decoded[row, which]
            first, second = (
                importance(q[row][:, which], k[row][:, which], self.scale) for q, k in pairs
            )
            noise = torch.rand(len(which), generator=self.generator)
            self._judge(row, hit, (second - first, first, -which.float(), noise))
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


def plot(report: dict[str, dict], path: Path) -> None:
    """Two panels of bars: AUC and recall at K, per task."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(10, 3.6), sharey=True)
    for panel, figure_name in zip(panels, ("auc", "recall_at_k"), strict=True):
        for index, score in enumerate(SCORES):
            heights = [report[task.name][figure_name][score] for task in TASKS]
            at = [position + 0.2 * index - 0.3 for position in range(len(TASKS))]
            panel.bar(at, heights, width=0.19, label=score)
        panel.set_xticks(range(len(TASKS)), [task.name for task in TASKS])
        panel.set_title("AUC" if figure_name == "auc" else f"recall at K = ceil({ALPHA} average)")
        panel.set_ylim(0, 1)
        panel.axhline(0.5, color="grey", linewidth=0.5)
    panels[1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(
    *,
    steps: Annotated[int, typer.Option(min=1, help="judged steps per task")] = 2000,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    seed: int = 2,
    batch: Annotated[int, typer.Option(min=1)] = 32,
    checkpoint: Path = CHECKPOINT,
    plot_path: Annotated[Path | None, typer.Option("--plot", help="PNG file")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file; standard output if none")] = None,
) -> None:
    """Score the masked tokens of `steps` steps per task, or of 3200 prompts; write JSON.

    A step is judged if it leaves a token undecoded and K does not already cover all of them.
    """
    torch.set_num_threads(threads)
    try:
        model, tokenizer = load(checkpoint)
    except FileNotFoundError as error:
        console.print(f"[red]{error}")
        raise typer.Exit(2) from error
    report: dict[str, dict] = {}
    with Progress(console=console) as bar:
        for task in TASKS:
            recorder = Recorder(model, seed)
            prompts = [example.prompt for example in examples(task.name, MOST_PROMPTS, seed)]
            row = bar.add_task(task.name, total=steps)
            at = 0
            while len(recorder.recall["delta"]) < steps and at < len(prompts):
                decode(model, tokenizer, prompts[at : at + batch], observe=recorder)
                at += batch
                bar.update(row, completed=min(steps, len(recorder.recall["delta"])))
            recorder.close()
            report[task.name] = {
                "prompts": at,
                "steps": recorder.steps,
                "auc_steps": len(recorder.auc["delta"]),
                "recall_steps": len(recorder.recall["delta"]),
                "k_share_of_masked": fmean(recorder.targets),
                "best_possible_recall": fmean(recorder.ceiling),
                "auc": {name: fmean(values) for name, values in recorder.auc.items()},
                "recall_at_k": {name: fmean(values) for name, values in recorder.recall.items()},
            }
    if plot_path is not None:
        plot(report, plot_path)
    text = json.dumps(report, indent=2)
    if out is None:
        typer.echo(text)
    else:
        out.write_text(text + "\n")


if __name__ == "__main__":
    typer.run(main)
