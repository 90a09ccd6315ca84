"""Ranking signals by name: what takes the place of FOCUS's delta (docs/algorithm.md section 12)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["SIGNALS", "Choice", "Signal", "Step", "check_signal", "signal_of"]


@dataclass(frozen=True)
class Signal:
    """The ranking signal, ``weights[0] * importance0 + weights[1] * importance1 + bias``.

    The default is FOCUS's: importance at layer 1 minus importance at layer 0. ``bias`` is fp32
    ``[B, T]`` or None.
    """

    weights: tuple[float, float] = (-1.0, 1.0)
    bias: Tensor | None = None


@dataclass(frozen=True)
class Step:
    """What a signal hook may look at; tensors are ``[B, T]``.

    Attributes:
        index: of the step in its session; ids, masked, fed: of this call.
        confidence: fp32, the largest probability of each token, the mask token's excepted, when its
            logits were last computed in this block; 0 where they never were. age: int64, how many
            steps ago that was, 0: in the step before; -1: never. All as at first unless
            ``session.confidences`` is set; None where the program is not known to return logits.
    """

    index: int
    ids: Tensor
    masked: Tensor
    fed: Tensor
    confidence: Tensor | None = None
    age: Tensor | None = None


Choice = str | tuple[float, float] | Signal | Callable[[Step], Signal]
"""A name of :data:`SIGNALS`, weights of both importances, or a signal or function of the user's."""


def position(step: Step) -> Signal:
    """The leftmost tokens: a bias that falls so fast that no two tokens stand out from the rest."""
    rank = step.masked.cumsum(1) - 1
    return Signal((0.0, 0.0), torch.exp2(-10.0 * rank.float()))


def last_confidence(step: Step) -> Signal:
    """The confidence that a token had when it was last computed; of equal ones the newest first.

    Raises:
        ValueError: the logits are not known.
    """
    if step.confidence is None or step.age is None:
        raise ValueError("signal='confidence': this program is not known to return logits")
    newer = torch.where(step.age < 0, 0.0, 2.0**-20 / (1 + step.age))
    return Signal((0.0, 0.0), step.confidence + newer)


SIGNALS: dict[str, Signal | Callable[[Step], Signal]] = {
    "delta": Signal(),
    "importance": Signal((0.0, 1.0)),
    "position": position,
    "confidence": last_confidence,
}


def check_signal(choice: Any) -> Choice:
    """A choice that can be resolved.

    Raises:
        ValueError: it is none.
    """
    if isinstance(choice, str) and choice in SIGNALS:
        return choice
    if isinstance(choice, Signal) or (callable(choice) and not isinstance(choice, str)):
        return choice
    if isinstance(choice, list | tuple) and len(choice) == 2:
        if all(isinstance(weight, int | float) for weight in choice):
            return float(choice[0]), float(choice[1])
    raise ValueError(
        f"signal={choice!r}: expected one of {tuple(SIGNALS)}, the weights of both importances, a "
        "Signal, or a function that returns one"
    )


def signal_of(choice: Choice, step: Step) -> Signal:
    """What ranks the tokens of one step."""
    if isinstance(choice, tuple):
        return Signal(choice)
    found = SIGNALS[choice] if isinstance(choice, str) else choice
    return found if isinstance(found, Signal) else found(step)


def reads_confidence(choice: Choice) -> bool:
    """Whether a signal may ask for the confidences of steps before."""
    found = SIGNALS[choice] if isinstance(choice, str) else choice
    return callable(found) and found is not position
