"""The first steps of a block, played with a model that is compiled in one way or another."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from focus_compile.rounding import TOLERANCE
from focus_compile.runtime.session import session
from focus_compile.runtime.signals import Signal, Step
from focus_compile.torch_private import tree_leaves

__all__ = [
    "Call",
    "PlayedStep",
    "default_signal",
    "difference",
    "distance",
    "left_first",
    "output_tensors",
    "play",
]

_STEPS = 3
_FAR = 1e3
"""A bias per position that no importance outweighs."""


def default_signal(_: Step) -> Signal:
    """The model's own."""
    return Signal()


def left_first(step: Step) -> Signal:
    """One that ranks masks from left to right."""
    positions = torch.arange(step.ids.shape[1], dtype=torch.float32)
    return Signal(bias=-_FAR * positions.expand(step.ids.shape))


@dataclass(frozen=True)
class Call:
    """A denoising call: its arguments, and the id of the mask token."""

    args: Sequence[Any]
    kwargs: dict[str, Any]
    mask_token_id: int

    def run(self, model: Callable[..., Any]) -> Any:
        return model(*copy.deepcopy(self.args), **copy.deepcopy(self.kwargs))

    def next(self, ids: Tensor, retain_mask: Tensor) -> Call | None:
        """The call after a step: of each row's masks the leftmost that was retained is decoded.

        ``ids``, ``retain_mask``: of the step, ``[B, T]``. None where nothing can be decoded, or
        where no argument holds the ids as they are.
        """
        masked = (ids == self.mask_token_id) & retain_mask
        leftmost = masked & (masked.cumsum(1) == 1)
        next_ids = ids.masked_fill(leftmost, 1 if self.mask_token_id == 0 else 0)

        def changed(value: Any) -> Any:
            same_size = isinstance(value, Tensor) and value.numel() == ids.numel()
            if not same_size or not torch.equal(value.reshape(ids.shape), ids):
                return value
            return next_ids.reshape(value.shape)

        args = [changed(value) for value in self.args]
        kwargs = {name: changed(value) for name, value in self.kwargs.items()}
        before, after = (*self.args, *self.kwargs.values()), (*args, *kwargs.values())
        replaced = any(old is not new for old, new in zip(before, after, strict=True))
        return Call(args, kwargs, self.mask_token_id) if replaced and bool(leftmost.any()) else None


@dataclass(frozen=True)
class PlayedStep:
    """One masked call of a session, and what it gave."""

    call: Call
    outputs: list[Tensor]
    retain_mask: Tensor
    fed: int
    retained: int


def play(
    model: Callable[..., Any], call: Call, alpha: float, signal: Callable[[Step], Signal]
) -> list[PlayedStep]:
    """The first steps of a block; none where FOCUS does not run."""
    steps: list[PlayedStep] = []
    step_ids: list[Tensor] = []

    def listen(step: Step) -> Signal:
        step_ids.append(step.ids)
        return signal(step)

    current: Call | None = call
    with session(call.mask_token_id, alpha=alpha, signal=listen, first_step="evict") as focus:
        while current is not None and len(steps) < _STEPS:
            outputs = output_tensors(current.run(model))
            if focus.stats.steps == len(steps):  # no masks are left, or it is refused
                break
            assert focus.retain_mask is not None
            fed, retained = focus.stats.fed_per_step[-1], focus.stats.retained_per_step[-1]
            steps.append(PlayedStep(current, outputs, focus.retain_mask, fed, retained))
            current = current.next(step_ids[-1], focus.retain_mask)
    return steps


def distance(steps: Sequence[PlayedStep], others: Sequence[PlayedStep]) -> float:
    """How far two plays are from each other; infinite where they retained other tokens."""
    pairs = list(zip(steps, others, strict=False))
    if len(steps) != len(others) or not all(
        torch.equal(a.retain_mask, b.retain_mask) for a, b in pairs
    ):
        return math.inf
    return max(difference(a.outputs, b.outputs) for a, b in pairs)


def output_tensors(outputs: Any) -> list[Tensor]:
    """Numbers among a model's outputs; a cache is none of them."""
    leaves = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
    return [leaf for leaf in leaves if leaf.dtype in TOLERANCE]


def difference(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    pairs = zip(left, right, strict=True)
    largest = [(a.double() - b.double()).abs().max().item() for a, b in pairs if a.numel()]
    return max(largest, default=0.0)
