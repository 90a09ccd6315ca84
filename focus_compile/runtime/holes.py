"""Keys and values that a masked call returned, and that came back as another call's past.

A masked call computes none of evicted tokens in later layers. Most callers drop what such a call
returns, or crop it. One that keeps it, as the caches of some loops are filled, would have later
calls attend to slots that hold nothing, or what was there some steps ago. So the last layer's
values that are returned have a number there that no value is, and that counts as 0 in every
product. It survives copies, crops, concatenations and casts between fp32 and bf16, which the
identity of a tensor does not. A past that holds it is completed
(:mod:`focus_compile.runtime.origin`), or the call is refused.

Values, not keys: these may be returned from before their rotary embedding, where they are no slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from threading import Event
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from focus_compile.errors import UncommittedHistory
from focus_compile.graph.sharding import local
from focus_compile.ops.packing import clear
from focus_compile.programs.halves import Halves
from focus_compile.programs.layout import Layout
from focus_compile.runtime.arguments import arguments

__all__ = ["Holes", "empty_slots", "refuse_any"]

TINY = 1.5703125 * 2.0**-96
"""Exact in fp32 and bf16."""
TINY_HALF = 201 * 2.0**-24
"""Exact in fp16, whose least value is 2^-24."""
_marked = Event()
"""Set once anything was marked: graphs that are left unchanged do not look before."""


def _value(dtype: torch.dtype) -> float | None:
    if not dtype.is_floating_point or dtype.itemsize == 1:
        return None
    return TINY_HALF if dtype == torch.float16 else TINY


def empty_slots(past: Tensor, dim: int) -> Tensor | None:
    """Which slots of a past are marked, bool ``[S]``, in any row; None: none is."""
    found = _empty_slots(past, dim)
    return None if found is None else found.any(0)


def _empty_slots(past: Tensor, dim: int) -> Tensor | None:
    """Row by row, bool ``[B, S]``.

    One number of each slot is read, and all of them only where that one is the mark.
    """
    value = _value(past.dtype)
    if value is None or not past.numel():
        return None
    moved = past.movedim((0, dim), (0, 1))
    one = moved
    while one.dim() > 2:
        one = one.select(-1, 0)
    if not bool((one == value).any()):
        return None
    found = (moved == value).flatten(2).all(-1)
    return found if bool(found.any()) else None


class Holes:
    """The last layer's values of one graph: as it returns them, and as it is given them."""

    def __init__(self, halves: Halves, layout: Layout) -> None:
        self.layout = layout
        self.values = halves.slots[layout.slots[-1].name]
        self.tails = {
            own.name: tail
            for own, tail in zip(halves.own, halves.tails, strict=True)
            if own is not None and tail is not None
        }
        pairs = zip(layout.inputs, layout.arguments, strict=True)
        self.past = next((at for given, at in pairs if given.name == layout.past_values), None)

    def marked(self, values: dict[str, Tensor], kept: Tensor) -> dict[str, Tensor]:
        """Marks where a token was not retained, bool ``[B, T]``, in all that is returned of them.

        The session goes on with the values as they are: it knows which slots hold anything, and
        lets others see what evicted tokens had in earlier steps.
        """
        made = values[self.values]
        value = _value(made.dtype)
        if not self.tails or value is None:
            return values
        copy = made.clone()
        clear(copy, kept, self.layout.values_dim, value)
        _marked.set()
        given = values | {self.values: copy}
        shown = {}
        for name, tail in self.tails.items():
            (shown[name],) = tail.gm(*(given[each] for each in tail.inputs))
        return values | shown

    def empty(self, args: Sequence[Any], tokens: int) -> Tensor | None:
        """Slots that hold nothing, and to which a call would attend, bool ``[S]``; None: none is.

        ``tokens``: of the block. Of a cache of fixed length the slots that the call itself takes do
        not count, nor, where there is a mask, those behind them; all do where it is not known
        which these are (:meth:`~.layout.Layout.looked_up`).
        """
        layout = self.layout
        past = None if self.past is None else local(self.past.of(args))
        empty = None if past is None else _empty_slots(past, layout.values_dim)
        if empty is None:
            return None
        own = layout.given + len(layout.parts)
        if layout.index is not None and (layout.look_ups is None or len(args) > own):
            values = arguments(layout, args, tokens)
            (places,) = layout.index.gm(*(values[name] for name in layout.index.inputs))
            places = places.remainder(empty.shape[1]).expand(len(empty), -1)
            empty.scatter_(1, places, False)
            if layout.masked:
                slots = torch.arange(empty.shape[1], device=empty.device)
                empty &= slots < places.amin(1, keepdim=True)
        return empty.any(0) if bool(empty.any()) else None


def refuse_any(args: Sequence[Any]) -> None:
    """A graph that is left unchanged: nobody knows which of its arguments are keys.

    Raises:
        UncommittedHistory: one of them has slots that hold nothing.
    """
    if not _marked.is_set():
        return
    for arg in args:
        if not isinstance(arg, Tensor) or isinstance(arg, Parameter) or arg.dim() != 4:
            continue
        for dim in (1, 2):
            empty = empty_slots(local(arg), dim)
            if empty is not None:
                raise UncommittedHistory(int(empty.sum()))
