"""What FOCUS would have kept at each step of a dense decoding: docs/algorithm.md section 13."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from focus_compile.calibration.record import DenseStep
from focus_compile.ops.selection import retain, target
from focus_compile.runtime.block import BlockState, History
from focus_compile.runtime.signals import Signal, Step, signal_of

__all__ = ["LETTERS", "Candidate", "Tally", "replay"]

LETTERS = {
    "d": ("decoded", "masked, kept, and decoded by dense"),
    "m": ("missed", "masked and decoded by dense, but evicted: decoded later"),
    "s": (
        "rescued",
        "masked and evicted, with nothing sure among what was kept: computed after all",
    ),
    "r": ("retained", "masked and kept"),
    "e": ("evicted", "masked and evicted"),
    "a": ("again", "decoded before, fed once more"),
    "o": ("done", "decoded before, not fed"),
}
"""What a picture's letters are, and mean."""


@dataclass(frozen=True)
class Candidate:
    """A way to choose: options of the backend and of a session.

    ``signal``: a name of :data:`~focus_compile.runtime.signals.SIGNALS`, weights of the importances
    of ``layers``, or ``"random"``, the control that nobody would choose.
    """

    signal: str | tuple[float, float]
    layers: tuple[int, int]
    first_step: str

    @property
    def name(self) -> str:
        first, second = self.layers
        signal = self.signal
        if signal == "delta":
            return f"delta {second}-{first}"
        if signal == "importance":
            return f"importance {second}"
        if isinstance(signal, tuple):
            return f"importance {first}" if signal == (1.0, 0.0) else f"weights {signal}"
        return signal


@dataclass
class Tally:
    """Sums over the row-steps of one candidate's replay.

    Attributes:
        steps: row-steps with masks; decoded: tokens that dense decoded in them.
        cost: in token-layers; gain: decoded tokens that FOCUS is expected to decode as well.
        evicting: row-steps in which something was evicted; saved, spent: of these, token-layers
            that a rescue would add, and those without it.
        sure: evicting steps in which dense decoded a token above the threshold; hits: of these,
            those in which one of them was kept; kept: shares of the masks that were, summed.
        ranked: steps with a ranking to judge; auc, recall: of dense's tokens in it, summed.
        picture: the first row of the first block: a line a step, a :data:`LETTERS` key a token.
    """

    steps: int = 0
    decoded: int = 0
    cost: float = 0.0
    gain: int = 0
    evicting: int = 0
    saved: float = 0.0
    spent: float = 0.0
    sure: int = 0
    hits: int = 0
    rescued: int = 0
    kept: float = 0.0
    ranked: int = 0
    auc: float = 0.0
    recall: float = 0.0
    picture: list[str] = field(default_factory=list)

    def predicted(self, layers: int, block: int) -> float:
        """Cost relative to dense, for each decoded token."""
        dense = block * layers * self.steps / self.decoded
        return (self.cost / self.gain) / dense


NO_HISTORY = History(0, None)


def replay(
    steps: Sequence[DenseStep],
    candidate: Candidate,
    tally: Tally,
    *,
    alpha: float,
    threshold: float,
    layers: int,
) -> None:
    """Follow one block of a batch with a candidate's own choices, and add them up in ``tally``.

    ``layers``: of the model.
    """
    ids = torch.zeros_like(steps[0].masked, dtype=torch.int64)  # which ones does not matter
    state = BlockState(ids, steps[0].masked, NO_HISTORY)
    early = candidate.layers[1] + 1
    late = layers - early
    generator = torch.Generator().manual_seed(0)
    drawn = not tally.steps
    for index, step in enumerate(steps):
        if index:
            state.observe(ids, step.masked, NO_HISTORY)
        rows, average = step.masked.any(1), state.average
        if candidate.first_step == "open":
            average = torch.where(state.warm, average, torch.inf)
        fed = state.fed(delayed_cache=True, skip_decoded_rows=True)
        factor = torch.tensor(alpha)
        if candidate.signal == "random":
            scores = torch.rand(step.masked.shape, generator=generator)
        else:
            seen = Step(index, ids, step.masked, fed, state.confidence, state.age)
            scores = _scores(candidate, step, signal_of(candidate.signal, seen))
        kept = retain(scores, step.masked, fed, state.progress, average, factor)
        kept &= rows.unsqueeze(1)
        number_fed, number_kept = fed.sum(1), kept.sum(1)
        evicts = number_kept < number_fed
        sure = step.decoded & (step.confidence >= threshold)
        missed = evicts & ~(sure & kept).any(1)
        decoded = step.decoded.sum(1)
        extra = late * (number_fed - number_kept)
        spent = early * number_fed + late * number_kept
        if drawn and bool(rows[0]):
            tally.picture.append(_letters(step, fed[0], kept[0], bool(missed[0])))
        both = (step.decoded & kept).sum(1).clamp_min(1)
        tally.steps += int(rows.sum())
        tally.decoded += int(decoded.sum())
        tally.cost += float((spent + extra * missed)[rows].sum())
        tally.gain += int(torch.where(missed, decoded, both)[rows].sum())
        tally.evicting += int(evicts.sum())
        tally.saved += float(extra[evicts].sum())
        tally.spent += float(spent[evicts].sum())
        judged = evicts & sure.any(1)
        tally.sure += int(judged.sum())
        tally.hits += int((judged & (sure & kept).any(1)).sum())
        tally.rescued += int(missed.sum())
        share = (kept & step.masked).sum(1) / step.masked.sum(1).clamp_min(1)
        tally.kept += float(share[evicts].sum())
        budget = target(step.masked.sum(1), average, factor)
        _judge(tally, scores, step, budget, rows & (budget < step.masked.sum(1)))
        computed = torch.where(missed.unsqueeze(1), fed, kept)
        state.advance(fed, computed, {}, delayed_cache=True)
        state.computed(step.confidence.masked_fill(~computed, -1))
        state.retained = torch.ones_like(fed)  # dense decodes whatever it likes


def _letters(step: DenseStep, fed: Tensor, kept: Tensor, missed: bool) -> str:
    """The first row of a step."""
    letters = ""
    for masked, decoded, is_fed, is_kept in zip(
        *(each.tolist() for each in (step.masked[0], step.decoded[0], fed, kept)), strict=True
    ):
        if not masked:
            letters += "a" if is_fed else "o"
        elif is_kept:
            letters += "d" if decoded else "r"
        else:
            letters += "s" if missed else "m" if decoded else "e"
    return letters


def _scores(candidate: Candidate, step: DenseStep, signal: Signal) -> Tensor:
    first, second = (step.importances[layer] for layer in candidate.layers)
    scores = signal.weights[0] * first + signal.weights[1] * second
    return scores if signal.bias is None else scores + signal.bias


def _judge(tally: Tally, scores: Tensor, step: DenseStep, budget: Tensor, rows: Tensor) -> None:
    """How well scores rank what dense decodes: AUC, and recall among as many as the budget."""
    for row in rows.nonzero().flatten().tolist():
        masked = step.masked[row]
        values, wanted = scores[row][masked], step.decoded[row][masked]
        if bool(wanted.all()):
            continue
        pairs = values[wanted].unsqueeze(1) - values[~wanted].unsqueeze(0)
        tally.auc += float(((pairs > 0).float() + 0.5 * (pairs == 0).float()).mean())
        first = values.argsort(descending=True, stable=True)[: int(budget[row])]
        tally.recall += float(wanted[first].sum() / wanted.sum())
        tally.ranked += 1
