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
    "apart",
    "difference",
    "left_first",
    "own_signal",
    "play",
    "tensors",
]

_STEPS = 3
_FAR = 1e3
"""A bias per position that no importance outweighs."""


def own_signal(_: Step) -> Signal:
    """The model's own."""
    return Signal()


def left_first(step: Step) -> Signal:
    """One that ranks masks from left to right."""
    places = torch.arange(step.ids.shape[1], dtype=torch.float32)
    return Signal(bias=-_FAR * places.expand(step.ids.shape))


@dataclass(frozen=True)
class Call:
    """A denoising call: its arguments, and the id of the mask token."""

    args: Sequence[Any]
    kwargs: dict[str, Any]
    mask_token_id: int

    def run(self, of: Callable[..., Any]) -> Any:
        return of(*copy.deepcopy(self.args), **copy.deepcopy(self.kwargs))

    def next(self, ids: Tensor, kept: Tensor) -> Call | None:
        """The call after a step: of each row's masks the leftmost that was kept is decoded.

        ``ids``, ``kept``: of the step, ``[B, T]``. None where nothing can be decoded, or where no
        argument holds the ids as they are.
        """
        masked = (ids == self.mask_token_id) & kept
        first = masked & (masked.cumsum(1) == 1)
        after = ids.masked_fill(first, 1 if self.mask_token_id == 0 else 0)

        def changed(value: Any) -> Any:
            same = isinstance(value, Tensor) and value.numel() == ids.numel()
            if not same or not torch.equal(value.reshape(ids.shape), ids):
                return value
            return after.reshape(value.shape)

        args = [changed(value) for value in self.args]
        kwargs = {name: changed(value) for name, value in self.kwargs.items()}
        before, now = (*self.args, *self.kwargs.values()), (*args, *kwargs.values())
        found = any(one is not two for one, two in zip(before, now, strict=True))
        return Call(args, kwargs, self.mask_token_id) if found and bool(first.any()) else None


@dataclass(frozen=True)
class PlayedStep:
    """One masked call of a session, and what it gave."""

    call: Call
    outputs: list[Tensor]
    kept: Tensor
    fed: int
    retained: int


def play(
    of: Callable[..., Any], call: Call, alpha: float, signal: Callable[[Step], Signal]
) -> list[PlayedStep]:
    """The first steps of a block; none where FOCUS does not run."""
    steps: list[PlayedStep] = []
    seen: list[Tensor] = []

    def listen(step: Step) -> Signal:
        seen.append(step.ids)
        return signal(step)

    now: Call | None = call
    with session(call.mask_token_id, alpha=alpha, signal=listen) as focus:
        while now is not None and len(steps) < _STEPS:
            outputs = tensors(now.run(of))
            if focus.stats.steps == len(steps):  # no masks are left, or it is refused
                break
            assert focus.retain_mask is not None
            fed, retained = focus.stats.fed_per_step[-1], focus.stats.retained_per_step[-1]
            steps.append(PlayedStep(now, outputs, focus.retain_mask, fed, retained))
            now = now.next(seen[-1], focus.retain_mask)
    return steps


def apart(made: Sequence[PlayedStep], again: Sequence[PlayedStep]) -> float:
    """How far two plays are from each other; infinite where they retained other tokens."""
    pairs = list(zip(made, again, strict=False))
    if len(made) != len(again) or not all(torch.equal(a.kept, b.kept) for a, b in pairs):
        return math.inf
    return max(difference(a.outputs, b.outputs) for a, b in pairs)


def tensors(made: Any) -> list[Tensor]:
    """Numbers among a model's outputs; a cache is none of them."""
    leaves = [leaf for leaf in tree_leaves(made) if isinstance(leaf, Tensor)]
    return [leaf for leaf in leaves if leaf.dtype in TOLERANCE]


def difference(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    pairs = zip(left, right, strict=True)
    found = [(a.double() - b.double()).abs().max().item() for a, b in pairs if a.numel()]
    return max(found, default=0.0)
