"""Answers lost and won, and what steps cost: one factor at a time around FOCUS's defaults.

    python -m benchmarks.protocol --out docs/protocol.json

Around delta, alpha 1.5, rescue at the threshold and ``first_step="auto"``: every signal, also with
an open first step; rescue; the first step; alpha; what ``calibrate`` says of the task; logits
divided by 2, where a model is seldom sure; bf16. Both tiny models, every task, the same prompts for
all. What the file holds is not measured again: a run may be interrupted.
"""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from torch import nn
from transformers import AutoTokenizer, Qwen3ForCausalLM

import focus_compile
from benchmarks.provenance import commit, cpu
from benchmarks.quality import decoded_batches, random_signal

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "examples" / "tiny_dllm"
MODELS = {"natural": "checkpoint", "aligned": "aligned_checkpoint"}
sys.path.insert(0, str(TINY))
from tasks import TASK_BY_NAME, examples  # noqa: E402

THRESHOLD, BLOCK, NEW = 0.9, 32, 96
FIT, FIT_SEED = 32, 1000
"""Prompts that ``calibrate`` sees, and the seed they are drawn with: none of those that count."""
SHORT = 4
"""A contestant in bf16 gets one prompt in so many."""


@dataclass(frozen=True)
class Contestant:
    """One way to decode.

    Attributes:
        factor: what it varies; session: settings of :func:`focus_compile.session`.
        fit: ``"all"``: with what ``calibrate`` says of the task; ``"gate"``: with its gate alone.
        scale: of the logits.
    """

    name: str
    factor: str
    session: dict[str, Any] = field(default_factory=dict)
    dense: bool = False
    fit: str = ""
    scale: float = 1.0
    dtype: torch.dtype = torch.float32

    @property
    def model(self) -> tuple[float, torch.dtype]:
        """Contestants of the same are compared with one another."""
        return self.scale, self.dtype


SIGNALS: dict[str, Any] = {
    "delta": "delta",
    "importance 1": "importance",
    "importance 0": (1.0, 0.0),
    "importance 1 - importance 0 / 2": (-0.5, 1.0),
    "minus delta": (1.0, -1.0),
    "position": "position",
    "confidence": "confidence",
    "random": random_signal,
}
OPEN: dict[str, Any] = {"first_step": "open"}
HALF: dict[str, Any] = {"scale": 0.5}


def contestants() -> list[Contestant]:
    """Dense first: of each kind of model, it is what the others are compared with."""
    return [
        Contestant("dense", "dense", dense=True),
        Contestant("defaults", "defaults"),
        *(
            Contestant(f"{name}, open", "signal, open", {"signal": signal, **OPEN})
            for name, signal in SIGNALS.items()
        ),
        Contestant("nothing evicted", "alpha", {"alpha": 1e9}),
        *(
            Contestant(name, "signal", {"signal": signal})
            for name, signal in SIGNALS.items()
            if name != "delta"
        ),
        Contestant("no rescue", "rescue", {"rescue": None}),
        Contestant("gate calibrated", "rescue", fit="gate"),
        Contestant("first step evicts", "first step", {"first_step": "evict"}),
        Contestant("the paper's way", "first step", {"first_step": "evict", "rescue": None}),
        *(Contestant(f"alpha {alpha:g}", "alpha", {"alpha": alpha}) for alpha in (1.0, 2.0, 4.0)),
        Contestant("calibrated", "calibrated", fit="all"),
        Contestant("dense, logits / 2", "logits / 2", dense=True, **HALF),
        Contestant("defaults, logits / 2", "logits / 2", **HALF),
        Contestant("no rescue, logits / 2", "logits / 2", {"rescue": None}, **HALF),
        Contestant("gate calibrated, logits / 2", "logits / 2", fit="gate", **HALF),
        Contestant("dense, bf16", "bf16", dense=True, dtype=torch.bfloat16),
        Contestant("defaults, bf16", "bf16", dtype=torch.bfloat16),
    ]  # fmt: skip


class Subject:
    """A tiny model, its tokenizer, and it compiled for pairs of layers."""

    def __init__(self, name: str, scale: float, dtype: torch.dtype) -> None:
        folder = TINY / MODELS[name]
        self.words = AutoTokenizer.from_pretrained(folder)
        model = Qwen3ForCausalLM.from_pretrained(folder).eval()
        if scale != 1:
            head = copy.deepcopy(model.lm_head)
            head.weight = nn.Parameter(head.weight.detach() * scale)
            model.lm_head = head
        self.model = model.to(dtype)
        self.layers = int(model.config.num_hidden_layers)
        self._compiled: dict[tuple[int, int], Any] = {}
        self._fitted: dict[str, focus_compile.Calibration] = {}

    def compiled(self, layers: tuple[int, int] = (0, 1)) -> Any:
        """Graphs that are refused are errors."""
        if layers not in self._compiled:
            options = {"mask_token_id": self.words.mask_token_id, "strict": True, "layers": layers}
            model = copy.deepcopy(self.model)
            self._compiled[layers] = torch.compile(
                model, backend="focus", dynamic=True, options=options
            )
        return self._compiled[layers]

    def fitted(self, task: str) -> focus_compile.Calibration:
        """What ``calibrate`` says, of prompts that are not among those that count."""
        if task not in self._fitted:
            prompts = [example.prompt for example in examples(task, FIT, FIT_SEED)]
            self._fitted[task] = focus_compile.calibrate(
                self.model, prompts, self.words, max_new_tokens=NEW, block_length=BLOCK,
                confidence_threshold=THRESHOLD, progress=False,
            )  # fmt: skip
        return self._fitted[task]


def measure(
    contestant: Contestant, subject: Subject, task: str, n: int, batch: int
) -> dict[str, Any]:
    """Which prompts were answered wrongly, and what the denoising steps took.

    ``cost``: token-layers, ``2 fed + (L - 2) retained`` with the cut in layer 1, of rows that were
    not complete; commits are not counted.
    """
    settings, fit = dict(contestant.session), None
    pair, dense = (0, 1), contestant.dense
    if contestant.fit:
        fit = subject.fitted(task)
        found = fit.options or {}  # none: do not evict
        if contestant.fit == "gate":
            settings["rescue"] = found.get("rescue", THRESHOLD)
        else:
            dense = not found
            settings |= found
            pair = settings.pop("layers", pair)
    rescue = settings.pop("rescue", THRESHOLD)
    model = subject.model if dense else subject.compiled(pair)
    drawn, total = examples(task, n, 1), _Total(subject.layers, pair[1] + 1)
    torch.manual_seed(0)
    options = {"max_new_tokens": NEW, "block_length": BLOCK, "confidence_threshold": THRESHOLD}
    good: list[bool] = []
    for made, right in decoded_batches(
        model, subject.words, drawn, batch, settings, rescue=rescue, **options
    ):
        good += right
        total.add(made)
        assert dense or made.focus_steps == made.forwards, "a masked call ran the dense program"
    wrong = [index for index, right in enumerate(good) if not right]
    told: dict[str, Any] = {"n": n, "wrong": wrong, **total.told()}
    if fit is not None:
        told["fit"] = {"options": fit.options, "why": fit.why}
        if fit.chosen is not None:
            told["fit"]["predicted"] = fit.chosen.predicted
    return told


@dataclass
class _Total:
    """Steps of all batches of a contestant, and what they took."""

    layers: int
    scored: int
    row_steps: int = 0
    evicting: int = 0
    rescued: int = 0
    fed: int = 0
    kept: int = 0

    def add(self, made: focus_compile.Generated) -> None:
        self.row_steps += sum(int(count.sum()) for count in made.steps_per_block)
        if not made.focus_steps:
            return
        self.rescued += made.rescued_rows
        self.fed += sum(made.fed_per_step)
        self.kept += sum(int(mask.sum()) for mask in made.retain_masks)
        for step, rescued in zip(made.trace()["steps"], made.rescue_masks, strict=True):
            masked, retained = torch.tensor(step["masked"]), torch.tensor(step["retained"])
            self.evicting += int((masked & (~retained | rescued)).any(1).sum())

    def told(self) -> dict[str, Any]:
        cost = self.scored * self.fed + (self.layers - self.scored) * self.kept
        if not self.fed:  # all was dense
            cost = self.layers * BLOCK * self.row_steps
        return {
            "row_steps": self.row_steps, "evicting": self.evicting, "rescued_rows": self.rescued,
            "fed": self.fed, "retained": self.kept, "cost": cost,
        }  # fmt: skip


def main(
    *,
    n: int = 400,
    batch: int = 200,
    threads: int = 2,
    out: Path | None = None,
    model: Annotated[list[str] | None, typer.Option(help="some of the models")] = None,
    quick: bool = False,
) -> None:
    """Measure what the file lacks, docs/protocol.json unless another is named.

    ``quick``: 8 prompts of one model, and two contestants, into no file unless one is named.
    """
    torch.set_num_threads(threads)
    out = ROOT / "docs" / "protocol.json" if out is None and not quick else out
    everyone = contestants()
    if quick:
        n, everyone = 8, [each for each in everyone if each.name in ("dense", "defaults")]
    report: dict[str, Any] = {"rows": []}
    if out is not None and out.exists():
        report = json.loads(out.read_text())
    about = {"n": n, "batch": batch, "threshold": THRESHOLD, "block": BLOCK, "threads": threads}
    about |= {"torch": torch.__version__, "transformers": transformers.__version__, "cpu": cpu()}
    for name in ("n", "batch"):
        if report.get(name, about[name]) != about[name]:
            raise typer.BadParameter(f"{out} holds rows of {name}={report[name]}: name another")
    report = about | {"rows": report["rows"]}
    done = {(row["model"], row["task"], row["name"]) for row in report["rows"]}
    for name in (model or list(MODELS))[: 1 if quick else None]:
        kinds = dict.fromkeys(each.model for each in everyone)
        for kind in kinds:
            left = [
                (each, task)
                for each in everyone
                for task in TASK_BY_NAME
                if each.model == kind and (name, task, each.name) not in done
            ]
            if not left:
                continue
            torch._dynamo.reset()
            subject = Subject(name, *kind)
            for each, task in left:
                count = n // SHORT if each.dtype == torch.bfloat16 else n
                row = {"model": name, "task": task, "name": each.name, "factor": each.factor}
                row |= measure(each, subject, task, count, batch) | {"commit": commit()}
                report["rows"].append(row)
                if out is not None:
                    out.write_text(json.dumps(report) + "\n")
                print({key: len(value) if key == "wrong" else value for key, value in row.items()})


if __name__ == "__main__":
    typer.run(main)
