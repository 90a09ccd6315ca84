"""Which model a graph's arguments belong to, with which weights, and what computes its keys."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import Parameter

from focus_compile.graph.sharding import local
from focus_compile.torch_private import is_made_of_tensors

__all__ = ["NO_WEIGHTS", "Weights", "model_key", "overlap", "weights_of"]


def overlap(values: Sequence[Any], written: Collection[int]) -> bool:
    """Whether memory of a tensor among ``values`` that is ``written`` may be another's too.

    Views that interleave count as overlapping. What a tensor is made of is among ``values`` itself.
    """
    spans: dict[int, list[tuple[int, int, int]]] = {}
    for index, value in enumerate(values):
        if isinstance(value, Tensor) and not is_made_of_tensors(value) and value.numel():
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


def model_key(args: Sequence[Any]) -> tuple[int, ...]:
    """What tells one model from another: its parameters, among a graph's arguments."""
    return tuple(id(arg) for arg in args if isinstance(arg, Parameter))


@dataclass(frozen=True, eq=False)
class Weights:
    """What keys and values depend on besides the call: other ones belong to another state.

    Attributes:
        memory: of parameters and buffers, with how often it was written to.
        buffers: the buffers themselves, so that their memory is nobody else's meanwhile.
        program: what computes keys and values (:func:`key_program`).
        owners: the parameters, which it does not keep alive: others may get their memory.
    """

    memory: tuple[tuple[int, int], ...] = ()
    buffers: tuple[Tensor, ...] = ()
    program: str = ""
    owners: tuple[weakref.ref[Tensor], ...] = ()

    def same(self, other: Weights) -> bool:
        return (
            self.memory == other.memory
            and _identical(self.owners, other.owners)
            and self.program == other.program
            and _identical(self.buffers, other.buffers)
        )


def _identical(some: Sequence[object], others: Sequence[object]) -> bool:
    return len(some) == len(others) and all(
        one is two for one, two in zip(some, others, strict=True)
    )


NO_WEIGHTS = Weights()
"""Of calls whose state is dropped."""


def weights_of(args: Sequence[Any], buffers: Sequence[int] = (), program: str = "") -> Weights:
    """Of a call; ``buffers``: which arguments are the model's own, parameters excepted."""
    parameters = [arg for arg in args if isinstance(arg, Parameter)]
    held = tuple(args[index] for index in buffers if not isinstance(args[index], Parameter))
    parts = [local(arg) for arg in (*parameters, *held)]
    memory = ((part.data_ptr(), 0 if part.is_inference() else part._version) for part in parts)
    return Weights(tuple(memory), held, program, tuple(map(weakref.ref, parameters)))
