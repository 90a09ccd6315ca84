"""Inputs of the programs: their sizes by name, and fake tensors for them.

The passes run under fake tensors of *static* sizes, one generic number per name, which is many
times faster than symbolic ones. No pass reads a size off these numbers: sizes travel as nodes. The
compiler gets symbols in their place, one per name, in a fresh shape environment.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from focus_compile.torch_private import ConstantSource, DimDynamic, FakeTensorMode, ShapeEnv

__all__ = [
    "GENERIC",
    "Extent",
    "Input",
    "Symbols",
    "generic",
    "is_generic",
    "length",
    "name_of",
    "overlap",
    "runtime_inputs",
    "stands_in",
    "static_tensor",
]

Extent = int | str | tuple[Any, ...]
"""A size: a number, a name, or the sum of the extents of a tuple."""

GENERIC = {
    "batch": 10_007,
    "token": 20_011,
    "history": 40_009,
    "fed": 30_011,
    "fed_row": 15_013,
    "retained": 12_007,
    "retained_row": 11_003,
    "extra": 50_021,
}
"""One number per name: pairwise distinct primes that are no size of a model."""
_COMBINED = {
    number
    for one in GENERIC.values()
    for two in GENERIC.values()
    for number in (one + two, one * two)
}
HINTS = {
    "batch": 13,
    "token": 29,
    "history": 257,
    "fed": 211,
    "fed_row": 23,
    "retained": 89,
    "retained_row": 11,
    "extra": 101,
}
"""Sizes that the compiler tunes for.

Equalities with them are refused after compiling (``programs.SpecializedSize``); inequalities, such
as a choice of 32-bit indexing on a GPU, are not evaluated.
"""


@dataclass(frozen=True)
class Input:
    """One input of a program.

    Attributes:
        shape: its extents.
        stride: its strides where all extents are numbers; None: contiguous, or, where
            ``strided``, contiguous in the last dim only.
        parameter: whether it is a weight.
    """

    name: str
    shape: tuple[Extent, ...]
    dtype: torch.dtype
    device: torch.device
    stride: tuple[int, ...] | None = None
    strided: bool = False
    parameter: bool = False

    @property
    def symbolic(self) -> bool:
        return not all(isinstance(extent, int) for extent in self.shape)


def length(extent: Extent, sizes: Mapping[str, Any]) -> Any:
    """An extent as a number (or a symbol), given those of the names."""
    if isinstance(extent, int):
        return extent
    if isinstance(extent, str):
        return sizes[extent]
    total: Any = 0
    for part in extent:
        total = total + length(part, sizes)
    return total


def runtime_inputs(device: torch.device, batch: Extent) -> tuple[Input, ...]:
    """What the passes add to a graph's inputs, slots excepted; ``batch`` is 1 or its name."""
    boolean, integer, real = torch.bool, torch.int64, torch.float32
    shapes: dict[str, tuple[torch.dtype, tuple[Extent, ...]]] = {
        "masked": (boolean, (batch, "token")),
        "fed": (boolean, (batch, "token")),
        "progress": (integer, (batch,)),
        "average": (real, (batch,)),
        "alpha": (real, ()),
        "signal_weights": (real, (2,)),
        "signal_bias": (real, (batch, "token")),
        "fed_tokens": (integer, ("fed",)),
        "fed_inverse": (integer, (batch, "token")),
        "fed_rows": (integer, (batch, "fed_row")),
        "tokens": (integer, ("retained",)),
        "rows": (integer, (batch, "retained_row")),
        "written01": (boolean, (batch, "token")),
        "written": (boolean, (batch, "token")),
        "prefix_visibility": (boolean, ()),
    }
    made = [Input(name, shape, dtype, device) for name, (dtype, shape) in shapes.items()]
    return (*made, Input("reuse", (), boolean, torch.device("cpu")))


def static_tensor(mode: FakeTensorMode, given: Input) -> torch.Tensor:
    """The fake tensor that the passes see: every name at its generic number."""
    with mode:
        shape = [generic(extent) for extent in given.shape]
        if given.stride is not None:
            return torch.empty_strided(shape, given.stride, dtype=given.dtype, device=given.device)
        return torch.empty(shape, dtype=given.dtype, device=given.device)


class _Numbers(dict[str, int]):
    """The number of every name; ``history1``, ``history2``, ... get numbers of their own."""

    def __missing__(self, name: str) -> int:
        stem = name.rstrip("0123456789")
        return self[stem] + 18 * int(name[len(stem) :])


def generic(extent: Extent) -> int:
    """The number that stands for an extent."""
    return int(length(extent, _Numbers(GENERIC)))


def name_of(number: int) -> str | None:
    """The name (or the sum ``history + token``) that a number stands for, or None."""
    names = {stands: name for name, stands in GENERIC.items()}
    names[GENERIC["history"] + GENERIC["token"]] = "history + token"
    if number in names or not is_generic(number):
        return names.get(number)
    stem = "extra" if number > GENERIC["extra"] else "history"
    return f"{stem}{(number - GENERIC[stem]) // 18}"


def is_generic(number: int) -> bool:
    """Whether a number stands for a name: then it must not appear in a graph as a literal."""
    return number in GENERIC.values() or any(
        0 < number - GENERIC[stem] < 18 * 1000 and (number - GENERIC[stem]) % 18 == 0
        for stem in ("history", "extra")
    )


def stands_in(number: int) -> bool:
    """Whether a number stands for a name, or for the sum or product of two."""
    return number in _COMBINED or is_generic(number) or is_generic(number - GENERIC["token"])


class Symbols:
    """One backed symbol per name, each at least 2 to the compiler, in a fresh shape environment."""

    def __init__(self) -> None:
        self.shape_env = ShapeEnv(duck_shape=False)
        self.mode = FakeTensorMode(shape_env=self.shape_env, allow_non_fake_inputs=True)
        self.sizes: dict[str, torch.SymInt] = {}

    def tensors(self, inputs: Iterable[Input]) -> dict[str, torch.Tensor]:
        """Symbolic fake tensors by name."""
        return {given.name: self._tensor(given) for given in inputs}

    def _tensor(self, given: Input) -> torch.Tensor:
        for extent in given.shape:
            self._declare(extent)
        shape = [length(extent, self.sizes) for extent in given.shape]
        stride: list[Any] | None = None if given.stride is None else list(given.stride)
        if given.strided:
            stride = [1]
            for depth in range(len(shape) - 1):
                stride.insert(0, self._make(f"{given.name}_stride{depth}", 97 * 13**depth))
        with self.mode:
            if stride is not None:
                out = torch.empty_strided(shape, stride, dtype=given.dtype, device=given.device)
            else:
                out = torch.empty(shape, dtype=given.dtype, device=given.device)
            return torch.nn.Parameter(out, requires_grad=False) if given.parameter else out

    def _declare(self, extent: Extent) -> None:
        if isinstance(extent, str) and extent not in self.sizes:
            self.sizes[extent] = self._make(extent, _Numbers(HINTS)[extent])
        elif isinstance(extent, tuple):
            for part in extent:
                self._declare(part)

    def _make(self, name: str, hint: int) -> torch.SymInt:
        source = ConstantSource(f"focus_{name}")
        symbol = self.shape_env.create_symbol(hint, source, dynamic_dim=DimDynamic.DYNAMIC)
        size = self.shape_env.create_symintnode(symbol, hint=hint, source=source)
        assert isinstance(size, torch.SymInt)
        return size


def overlap(values: Sequence[Any], written: Sequence[int]) -> bool:
    """Whether memory of a tensor among ``values`` that is ``written`` may be another's too.

    Views that interleave count as overlapping.
    """
    spans: dict[int, list[tuple[int, int, int]]] = {}
    for index, value in enumerate(values):
        if isinstance(value, Tensor) and value.numel():
            size = value.element_size()
            steps = zip(value.shape, value.stride(), strict=True)
            start = int(value.storage_offset()) * size
            end = start + int(1 + sum((extent - 1) * step for extent, step in steps)) * size
            memory = value.untyped_storage().data_ptr()
            spans.setdefault(memory, []).append((start, end, index))
    return any(
        one[2] in written and one[2] != two[2] and one[0] < two[1] and two[0] < one[1]
        for group in spans.values()
        if len(group) > 1
        for one in group
        for two in group
    )
