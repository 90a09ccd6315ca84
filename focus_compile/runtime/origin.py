"""Where a past came from: a masked call, whose keys and values are computed after all.

Prefix and dual caches are filled by a masked call. What it returned of evicted tokens holds
nothing, and what it returned of others was computed without them. So when it comes back as a past,
as it was, cropped, copied or joined to something else, the call that made it is run again, densely,
and exact keys and values are written over those that came back, in every layer. The caller gets
what an eager model's cache would hold; it costs one dense call for each that fills a cache.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from focus_compile.programs.layout import Layout

__all__ = ["Origin", "Origins"]


@dataclass(frozen=True)
class Origin:
    """A masked call that returned keys and values, as it was made.

    Attributes:
        dense: the program that computes all of it.
        args: its arguments: weights, which it does not keep alive; pasts and the model's own
            tensors as they are, with ``versions`` that tell whether they still are; others copied.
        made: what it returned; values: a copy of the last layer's values among these, with slots
            along ``dim``. The caller may have written into its own since: these slots are let be.
    """

    dense: Callable[..., Any]
    args: tuple[Any, ...]
    versions: Mapping[int, int]
    made: tuple[Any, ...]
    values: Tensor
    dim: int

    @classmethod
    def of(
        cls,
        dense: Callable[..., Any],
        layout: Layout,
        args: Sequence[Any],
        made: Sequence[Any],
        values: Tensor,
    ) -> Origin | None:
        """None where it cannot be run again, or does not return the last layer's values as such."""
        if layout.written or layout.held or not any(each is values for each in made):
            return None
        kept = {argument.position for argument, _ in layout.pasts} | {*layout.buffers}
        kept |= {index for index, arg in enumerate(args) if isinstance(arg, Parameter)}
        versions = {index: _version(args[index]) for index in kept}
        copies = (
            weakref.ref(arg)
            if isinstance(arg, Parameter)
            else arg.clone()
            if isinstance(arg, Tensor) and index not in kept
            else arg
            for index, arg in enumerate(args)
        )
        copy = values.clone()
        return cls(dense, tuple(copies), versions, tuple(made), copy, layout.values_dim)

    def complete(self, pasts: Sequence[tuple[Tensor, int]], empty: Tensor) -> bool:
        """Write exact keys and values into a past that is of this call; whether it is.

        Args:
            pasts: keys and values of every layer with their dim of slots, in the order of those.
            empty: bool ``[S]``, the slots that must be of this call.
        """
        found = _common(*pasts[-1], self.values, self.dim)
        if found is None or not self._unchanged or not all(_is_writable(past) for past, _ in pasts):
            return False
        here, there = found
        if bool(empty.index_fill(0, here, False).any()):
            return False
        sources = [self._source(past, dim, here, there) for past, dim in pasts]
        if None in sources or len({*sources}) < len(sources):
            return False
        exact = self.dense(*(_alive(arg) for arg in self.args))
        for (past, dim), source in zip(pasts, sources, strict=True):
            past.index_copy_(dim, here, exact[source].index_select(dim, there))
        return True

    @property
    def _unchanged(self) -> bool:
        now = {index: _version(_alive(self.args[index])) for index in self.versions}
        return now == self.versions and -1 not in now.values()

    def _source(self, past: Tensor, dim: int, here: Tensor, there: Tensor) -> int | None:
        """Which of the returned values these keys or values are, by what they hold."""
        mine = past.index_select(dim, here)
        for index, made in enumerate(self.made):
            if isinstance(made, Tensor) and made.dim() == past.dim() and made.dtype == past.dtype:
                if made.shape[dim] > int(there.max()):
                    theirs = made.index_select(dim, there)
                    if mine.shape == theirs.shape and torch.equal(mine, theirs):
                        return index
        return None


class Origins:
    """The last masked call of a model, and the last one that a past was completed from."""

    def __init__(self) -> None:
        self._last: dict[tuple[int, ...], Origin] = {}
        self._used: dict[tuple[int, ...], Origin] = {}

    def begin(self, key: tuple[int, ...]) -> None:
        """Another masked call: the last one is no longer known, nor its memory held."""
        self._last.pop(key, None)

    def keep(self, key: tuple[int, ...], origin: Origin | None) -> None:
        """What the last masked call was; None: it cannot be made again."""
        if origin is not None:
            self._last[key] = origin

    def complete(
        self, key: tuple[int, ...], pasts: Sequence[tuple[Tensor, int]], empty: Tensor
    ) -> bool:
        """Whether a model's past was completed; arguments as for :meth:`Origin.complete`."""
        for origin in (self._last.get(key), self._used.get(key)):
            if pasts and origin is not None and origin.complete(pasts, empty):
                self._used[key] = origin
                return True
        return False

    def forget(self, key: tuple[int, ...]) -> None:
        self._last.pop(key, None)
        self._used.pop(key, None)

    def clear(self) -> None:
        self._last.clear()
        self._used.clear()


def _common(
    values: Tensor, dim: int, other: Tensor, other_dim: int
) -> tuple[Tensor, Tensor] | None:
    """Slots of one that are also the other's, at one distance: their places here and there.

    Of several distances that at which most slots are alike.
    """
    mine, theirs = values.movedim(dim, 0), other.movedim(other_dim, 0)
    if mine.shape[1:] != theirs.shape[1:] or mine.dtype != theirs.dtype:
        return None
    mine, theirs = mine.flatten(1), theirs.flatten(1)
    landmark = theirs[:, 0] != theirs[:, -1]  # a mark is none
    pairs = ((mine[:, :1] == theirs[:, 0]) & landmark).nonzero()
    best: tuple[Tensor, Tensor] | None = None
    for shift in {*(pairs[:, 0] - pairs[:, 1]).tolist()}:
        first, end = max(0, -shift), min(len(theirs), len(mine) - shift)
        there = torch.arange(first, end, device=mine.device)
        there = there[(mine[first + shift : end + shift] == theirs[first:end]).all(1)]
        if bool(landmark[there].any()) and (best is None or len(there) > len(best[0])):
            best = there + shift, there
    return best


def _alive(arg: Any) -> Any:
    return arg() if isinstance(arg, weakref.ref) else arg


def _is_writable(past: Tensor) -> bool:
    expanded = any(
        size > 1 and step == 0 for size, step in zip(past.shape, past.stride(), strict=True)
    )
    fixed = past.is_inference() and not torch.is_inference_mode_enabled()
    return not expanded and not fixed and not past.requires_grad


def _version(value: Tensor | None) -> int:
    """How often a tensor was written to; -1: it is gone, or does not count."""
    return -1 if value is None or value.is_inference() else int(value._version)
