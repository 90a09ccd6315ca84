"""A call's arguments as inputs of the canonical graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from focus_compile.graph.sharding import local
from focus_compile.ops.packing import clear
from focus_compile.programs.layout import Layout
from focus_compile.runtime.block import BlockState

__all__ = ["arguments", "held_slots"]


def arguments(layout: Layout, args: Sequence[Any], tokens: int) -> dict[str, Tensor]:
    """The canonical graph's inputs by name, laid out as the programs were compiled for.

    ``tokens``: how many of a cache that holds history and block are of the block.
    """
    values: dict[str, Tensor] = {}
    for spec, argument in zip(layout.inputs, layout.arguments, strict=True):
        value = argument.of(args)
        if isinstance(value, int):
            value = torch.tensor(value, device=spec.device)
        value = local(value)
        if spec.strided:
            fits = value.stride(-1) == 1
        else:
            fits = not spec.symbolic or value.is_contiguous()
        values[spec.name] = value if fits else value.contiguous()
    for held in layout.held:
        slots = values[held.past]
        values[held.past] = slots.narrow(held.dim, 0, slots.shape[held.dim] - tokens)
    return values


def held_slots(layout: Layout, args: Sequence[Any], state: BlockState) -> dict[str, Tensor]:
    """Slots that are the caller's cache: 0 where a block that begins holds nothing."""
    slots = {held.slot: local(held.argument.of(args)) for held in layout.held}
    if not state.goes_on:
        for held in layout.held:
            clear(slots[held.slot], state.written, held.dim)
    return slots
