"""Which signal, layers, first step and gate suit a model: docs/algorithm.md section 13."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from focus_compile.calibrated import fingerprint
from focus_compile.calibration.choice import Judged, choose, gate, judge, number
from focus_compile.calibration.record import DenseStep, Recorder
from focus_compile.calibration.replay import Candidate, Tally, replay
from focus_compile.compiling import shown
from focus_compile.generation.text import end_tokens, left_padded, prompt_ids
from focus_compile.models.mask_token import find_mask_token

__all__ = ["Calibration", "calibrate"]


@dataclass(frozen=True)
class Calibration:
    """What :func:`calibrate` found.

    Attributes:
        model, dtype, layers: which model it is of; prompts, block, threshold, alpha: how it was
            decoded, densely; steps: row-steps.
        judged: every candidate, cheapest first; weights: fingerprints of the model's parameters.
        options: for ``torch.compile(..., options=...)`` or ``session(...)``; None: do not evict.
        why: the choice in a sentence. chosen: who is behind the options, one of ``judged``.
    """

    model: str
    dtype: str
    layers: int
    prompts: int
    block: int
    threshold: float
    alpha: float
    steps: int
    forced: int
    judged: tuple[Judged, ...]
    weights: tuple[str, ...]
    options: dict[str, Any] | None
    why: str
    chosen: Judged | None = None

    def to_dict(self) -> dict[str, Any]:
        chosen = None if self.chosen is None else self.chosen.to_dict()
        judged = [each.to_dict() for each in self.judged]
        return asdict(self) | {"judged": judged, "chosen": chosen}

    def save(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(self.to_dict(), indent=1), encoding="utf-8")

    def __str__(self) -> str:
        lines = [
            f"{self.prompts} prompts, {self.steps} steps of rows, block {self.block}, threshold "
            f"{self.threshold}, alpha {self.alpha}; dense is forced in {self.forced} steps",
            "signal        first step  cost  hit              rescued  AUC   recall  kept",
        ]
        for each in self.judged:
            bounds = "" if each.hit_range is None else "{:.3f}-{:.3f}".format(*each.hit_range)
            lines.append(
                f"{each.candidate.name:13} {each.candidate.first_step:11} {each.predicted:.2f}  "
                f"{number(each.hit, 3)} {bounds:12} {each.missed:7.1%}  {number(each.auc, 2)}  "
                f"{number(each.recall, 2)}   {each.kept:.0%}"
            )
        return "\n".join([*lines, self.why])


def calibrate(
    model: nn.Module,
    prompts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    mask_token_id: int | None = None,
    block_length: int = 32,
    max_new_tokens: int = 64,
    confidence_threshold: float = 0.9,
    alpha: float = 1.5,
    batch: int = 8,
    use_cache: bool = True,
    early_layers: int = 3,
    progress: bool = True,
) -> Calibration:
    """Decode prompts densely, and find what would have kept what was decoded, at least cost.

    Args:
        prompts: texts, at least 32 for a result to rest on; tokenizer: theirs.
        early_layers: how many layers' attention is looked at; a cut lies inside the last of a pair.
        mask_token_id, block_length, max_new_tokens, confidence_threshold, use_cache: as in
            :func:`~focus_compile.generate`; without an id, as in :func:`~focus_compile.compile`.

    Raises:
        ValueError: there are no prompts, or the mask token is not to be found.
        Unsupported: FOCUS cannot be applied to the model.
    """
    if not prompts:
        raise ValueError("calibrate: there are no prompts")
    token = find_mask_token(model, tokenizer) if mask_token_id is None else mask_token_id
    config: Any = model.config
    count = int(config.num_hidden_layers)
    early_layers = min(early_layers, count - 1)
    recorder = Recorder(
        model, token, block=block_length, threshold=confidence_threshold, layers=early_layers,
        cached=use_cache,
    )  # fmt: skip
    tallies = {candidate: Tally() for candidate in candidates(early_layers)}
    forced: list[float] = []
    texts = sorted((prompt_ids(tokenizer, text) for text in prompts), key=len)
    ends = end_tokens(tokenizer, model)
    with (
        Progress(console=Console(stderr=True), transient=True, disable=not progress) as bar,
        shown(bar, job := bar.add_task("decoding densely", total=len(texts))),
    ):
        for at in range(0, len(texts), batch):
            part = texts[at : at + batch]
            ids, real = left_padded(part)
            for steps in recorder.blocks(ids, real, max_new_tokens, ends):
                forced += _forced(steps, confidence_threshold)
                for candidate, tally in tallies.items():
                    replay(
                        steps, candidate, tally, alpha=alpha, threshold=confidence_threshold,
                        layers=count,
                    )  # fmt: skip
            bar.advance(job, len(part))
    judged = {
        candidate: judge(candidate, tally, count, block_length)
        for candidate, tally in tallies.items()
    }
    chosen, why = choose(list(judged.values()))
    options = None
    any_tally = next(iter(tallies.values()))
    if chosen is not None:
        candidate = chosen.candidate
        tau = gate(tallies[candidate], forced, confidence_threshold)
        options = {
            "signal": candidate.signal, "layers": candidate.layers,
            "first_step": candidate.first_step, "rescue": tau,
        }  # fmt: skip
    return Calibration(
        model=str(getattr(config, "_name_or_path", "") or type(model).__name__),
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        layers=count,
        prompts=len(prompts),
        block=block_length,
        threshold=confidence_threshold,
        alpha=alpha,
        steps=any_tally.steps,
        forced=len(forced),
        judged=tuple(sorted(judged.values(), key=lambda each: each.predicted)),
        weights=tuple(sorted({fingerprint(each) for each in model.parameters()})),
        options=options,
        why=why,
        chosen=chosen,
    )


def candidates(early_layers: int) -> list[Candidate]:
    """Every signal at each pair of layers where it differs, evicting in a first step or not."""
    pairs = [(i, j) for j in range(1, early_layers) for i in range(j)]
    signals: list[tuple[str | tuple[float, float], tuple[int, int]]] = []
    for first, second in pairs:
        signals.append(("delta", (first, second)))
        if first == second - 1:
            signals.append(("importance", (first, second)))
    signals.append(((1.0, 0.0), (0, 1)))
    signals += [(name, (0, 1)) for name in ("position", "confidence", "random")]
    return [
        Candidate(signal, layers, first_step)
        for signal, layers in signals
        for first_step in ("evict", "open")
    ]


def _forced(steps: Sequence[DenseStep], threshold: float) -> list[float]:
    """Confidences of the tokens that dense itself decoded below the threshold."""
    found: list[float] = []
    for step in steps:
        values: Tensor = step.confidence[step.decoded]
        found += values[values < threshold].tolist()
    return found
