"""Run a call for real: eager, and compiled with FOCUS; compare them, and note what ran."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.fx import GraphModule

from focus_compile.backend import focus_backend
from focus_compile.programs.output_code import output_files
from focus_compile.programs.program import Inner
from focus_compile.reports.play import (
    Call,
    PlayedStep,
    default_signal,
    difference,
    distance,
    left_first,
    output_tensors,
    play,
)
from focus_compile.rounding import TOLERANCE
from focus_compile.runtime.executable import Executable
from focus_compile.runtime.session import session

__all__ = ["Measured", "measure", "with_fresh_code"]

_NOTHING_EVICTED = 1e9
_TIMES_DENSE = 4


@dataclass(frozen=True)
class Measured:
    """One call, run in several ways. Differences are the largest absolute ones of any output.

    Several steps are played, each decoding what the one before retained: with the model's own
    budget, and with the smallest one, alpha 1, and a signal that prefers the left, which evicts
    wherever a row has masks enough, whatever the model's own signal says.

    Attributes:
        fed, retained: tokens of the batch that layers 0 and 1, and the later layers, computed in
            the call itself, with the model's own budget; retained_row: the most of one row.
        steps: steps that were compared; evicted: tokens that these evicted, all together.
        largest: largest absolute value of eager's outputs.
        dense: difference between eager and Inductor's dense program.
        nothing_evicted: between eager and FOCUS with a budget so large that nothing is evicted,
            each step as the first of a session.
        evicting: between prefix and suffix as Inductor compiled them and the same graphs run
            operator by operator; None where they did not retain the same tokens.
        tolerance: what rounding may do: relative to ``largest`` or 1, by dtype (1e-5 for fp32), or
            four times what it does to the dense program.
        code: files of Inductor's output code, by program.
    """

    fed: int
    retained: int
    retained_row: int
    steps: int
    evicted: int
    largest: float
    dense: float
    nothing_evicted: float
    evicting: float | None
    tolerance: float
    code: dict[str, list[str]]

    @property
    def tested(self) -> bool:
        """Whether any step evicted a token: else nothing is known of evicting."""
        return self.evicted > 0

    @property
    def equal(self) -> bool:
        """Whether FOCUS's differences are within the tolerance."""
        differences = (self.nothing_evicted, self.evicting)
        return all(value is not None and value <= self.tolerance for value in differences)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"equal": self.equal, "tested": self.tested}


def with_fresh_code(model: Callable[..., Any]) -> Callable[..., Any]:
    """A function that calls ``model``, with a code object of its own.

    Dynamo keeps captures, and counts them, by code object.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    call.__code__ = call.__code__.replace()
    return call


@torch.no_grad()
def measure(
    model: Callable[..., Any],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    mask_token_id: int,
    alpha: float = 1.5,
) -> Measured | None:
    """Run a denoising call of ``model``; arguments are copied for every run.

    Returns:
        None where FOCUS is not applied to the call, or no token of it is masked.
    """
    compiled, by_operator = _Compiled(model, None), _Compiled(model, _uncompiled)
    call = Call(args, kwargs, mask_token_id)
    default_steps: list[PlayedStep] = []
    steps: list[PlayedStep] = []
    evicting = 0.0
    for budget, signal in ((alpha, default_signal), (1.0, left_first)):
        played = play(compiled.call, call, budget, signal)
        if not played:
            return None
        played_eagerly = play(by_operator.call, call, budget, signal)
        default_steps, steps = default_steps or played, steps + played
        evicting = max(evicting, distance(played, played_eagerly))
    largest = nothing_evicted = 0.0
    for step in default_steps:
        expected = output_tensors(step.call.run(model))
        largest = max([largest, *(value.abs().max().item() for value in expected if value.numel())])
        with session(mask_token_id, alpha=_NOTHING_EVICTED):
            compiled_outputs = output_tensors(step.call.run(compiled.call))
        nothing_evicted = max(nothing_evicted, difference(expected, compiled_outputs))
    expected = output_tensors(call.run(model))
    with session(mask_token_id, enabled=False):
        rounding = difference(expected, output_tensors(call.run(compiled.call)))
    allowed = max(TOLERANCE[value.dtype] for value in expected) * max(1.0, largest)
    return Measured(
        fed=default_steps[0].fed,
        retained=default_steps[0].retained,
        retained_row=int(default_steps[0].retain_mask.sum(1).max()),
        steps=len(steps),
        evicted=sum(step.fed - step.retained for step in steps),
        largest=largest,
        dense=rounding,
        nothing_evicted=nothing_evicted,
        evicting=None if math.isinf(evicting) else evicting,
        tolerance=max(allowed, _TIMES_DENSE * rounding),
        code=compiled.files(),
    )


def _uncompiled(graph: GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
    return graph


class _Compiled:
    """A model compiled with FOCUS, and where Inductor wrote its programs."""

    def __init__(self, model: Callable[..., Any], inner: Inner | None) -> None:
        self.inner = inner
        self.dense: list[str] = []
        self.executables: list[Executable] = []
        self.call = torch.compile(with_fresh_code(model), backend=self._backend)

    def _backend(self, gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        with output_files() as files:
            program = focus_backend(gm, inputs, inner=self.inner)
        self.dense += files
        if isinstance(program, Executable):
            self.executables.append(program)
        return program

    def files(self) -> dict[str, list[str]]:
        """Inductor's output code, by program."""
        prefixes = [path for executable in self.executables for path in executable.prefix.files]
        suffixes = [path for executable in self.executables for path in executable.suffix.files]
        return {"dense": self.dense, "prefix": prefixes, "suffix": suffixes}
