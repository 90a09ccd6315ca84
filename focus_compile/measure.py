"""Run a call for real: eager, and compiled with FOCUS; compare them, and note what ran."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

from focus_compile.backend import focus_backend
from focus_compile.output_code import output_files
from focus_compile.programs import Inner
from focus_compile.runtime import Executable
from focus_compile.session import session
from focus_compile.statistics import SessionStats

__all__ = ["Measured", "measure", "own_code"]

_NOTHING_EVICTED = 1e9
_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
_TIMES_DENSE = 4


@dataclass(frozen=True)
class Measured:
    """One call, run in several ways. Differences are the largest absolute ones of any output.

    Attributes:
        fed, retained: tokens of the batch that layers 0 and 1, and the later layers, computed;
            retained_row: the most of one row.
        largest: largest absolute value of eager's outputs.
        dense: difference between eager and Inductor's dense program.
        nothing_evicted: between eager and FOCUS with a budget so large that nothing is evicted.
        evicting: between prefix and suffix as Inductor compiled them and the same graphs run
            operator by operator, with the model's own budget; None where they did not retain the
            same tokens.
        tolerance: what rounding may do: relative to ``largest`` or 1, by dtype (1e-5 for fp32), or
            four times what it does to the dense program.
        code: files of Inductor's output code, by program.
    """

    fed: int
    retained: int
    retained_row: int
    largest: float
    dense: float
    nothing_evicted: float
    evicting: float | None
    tolerance: float
    code: dict[str, list[str]]

    @property
    def equal(self) -> bool:
        """Whether FOCUS's differences are within the tolerance."""
        found = (self.nothing_evicted, self.evicting)
        return all(value is not None and value <= self.tolerance for value in found)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"equal": self.equal}


def own_code(model: Callable[..., Any]) -> Callable[..., Any]:
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
    compiled, by_operator = _Compiled(model, None), _Compiled(model, _as_it_is)

    def outputs(
        of: Callable[..., Any], **options: Any
    ) -> tuple[list[Tensor], Tensor | None, SessionStats]:
        with session(mask_token_id, **options) as focus:
            made = of(*copy.deepcopy(args), **copy.deepcopy(kwargs))
            return _tensors(made), focus.retain_mask, focus.stats

    expected, _, _ = outputs(model)
    dense, _, _ = outputs(compiled.call, enabled=False)
    whole, _, _ = outputs(compiled.call, alpha=_NOTHING_EVICTED)
    made, kept, stats = outputs(compiled.call, alpha=alpha)
    again, other, _ = outputs(by_operator.call, alpha=alpha)
    if kept is None or other is None:
        return None
    same = torch.equal(kept, other)
    largest = max((value.abs().max().item() for value in expected if value.numel()), default=0.0)
    allowed = max(_TOLERANCE[value.dtype] for value in expected) * max(1.0, largest)
    rounding = _difference(expected, dense)
    return Measured(
        fed=stats.fed,
        retained=stats.retained,
        retained_row=int(kept.sum(1).max()),
        largest=largest,
        dense=rounding,
        nothing_evicted=_difference(expected, whole),
        evicting=_difference(made, again) if same else None,
        tolerance=max(allowed, _TIMES_DENSE * rounding),
        code=compiled.files(),
    )


def _as_it_is(graph: GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
    return graph


class _Compiled:
    """A model compiled with FOCUS, and where Inductor wrote its programs."""

    def __init__(self, model: Callable[..., Any], inner: Inner | None) -> None:
        self.inner = inner
        self.dense: list[str] = []
        self.executables: list[Executable] = []
        self.call = torch.compile(own_code(model), backend=self._backend)

    def _backend(self, gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        with output_files() as files:
            program = focus_backend(gm, inputs, inner=self.inner)
        self.dense += files
        if isinstance(program, Executable):
            self.executables.append(program)
        return program

    def files(self) -> dict[str, list[str]]:
        """Inductor's output code, by program."""
        prefixes = [path for made in self.executables for path in made.prefix.files]
        suffixes = [path for made in self.executables for path in made.suffix.files]
        return {"dense": self.dense, "prefix": prefixes, "suffix": suffixes}


def _tensors(made: Any) -> list[Tensor]:
    """Numbers among a model's outputs; a cache is none of them."""
    leaves = [leaf for leaf in tree_leaves(made) if isinstance(leaf, Tensor)]
    return [leaf for leaf in leaves if leaf.dtype in _TOLERANCE]


def _difference(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    pairs = zip(left, right, strict=True)
    found = [(a.double() - b.double()).abs().max().item() for a, b in pairs if a.numel()]
    return max(found, default=0.0)
