"""Where in a call's arguments the runtime finds ids, cache and slots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from focus_compile.axes.axes import Entry
from focus_compile.capture.canonical import Canonical
from focus_compile.capture.looked_up import LookUps
from focus_compile.capture.returned_sizes import ReturnedSize
from focus_compile.capture.unwrap import Part
from focus_compile.graph.inputs import Argument, Input
from focus_compile.graph.nodes import operands, tensor_of
from focus_compile.graph.recompute import no_constant_sizes
from focus_compile.plan.causal import is_causal
from focus_compile.plan.plan import Plan
from focus_compile.programs.cut import part
from focus_compile.programs.halves import Half
from focus_compile.programs.key_program import key_program

__all__ = ["Held", "Layout", "layout_of"]


@dataclass(frozen=True)
class Held:
    """An argument that holds history and block along ``dim``: ``slot``, of which ``past`` is part.

    Both are names of inputs.
    """

    argument: Argument
    past: str
    slot: str
    dim: int


@dataclass(frozen=True)
class Layout:
    """How the canonical graph's inputs relate to the arguments of Dynamo's graph.

    Attributes:
        inputs: the canonical graph's own inputs; arguments: the argument that each comes from.
        ids: the argument that holds the token ids.
        slots: inputs for the K/V of the step before, layer by layer.
        held: slots that are arguments, which hold history and block.
        past: name of the last layer's past keys; past_dim: their dim that is the history;
            past_values, values_dim: likewise. pasts: the argument and the dim of each layer's keys
            and values, in the order of the slots; empty where a layer has none.
        index: computes which slots of a cache of fixed length the block takes, int64 ``[T]``; None
            where the block follows the history.
        written: arguments that the model writes into; their values are the last ones returned.
        masked: whether the caller's mask hides slots of a cache of fixed length.
        causal: whether a mask that the model makes itself hides later tokens.
        buffers: arguments that are tensors of the model, beside its weights.
        parts: what weights and buffers are made of: arguments behind those of Dynamo's
            graph.
        key_program: what computes keys and values
            (:func:`~focus_compile.programs.key_program.key_program`).
        vocabulary: rows of the embedding, None where that is not known.
        sizes: numbers that the model returns, which no program computes.
        given: how many arguments Dynamo's graph has.
        look_ups: what is looked up in these: arguments behind ``parts``.
    """

    inputs: tuple[Input, ...]
    arguments: tuple[Argument, ...]
    ids: int
    slots: tuple[Input, ...]
    past: str | None
    past_dim: int
    past_values: str | None
    values_dim: int
    pasts: tuple[tuple[Argument, int], ...]
    index: Half | None
    written: tuple[Argument, ...]
    masked: bool = False
    causal: bool = False
    buffers: tuple[int, ...] = ()
    key_program: str = ""
    vocabulary: int | None = None
    held: tuple[Held, ...] = ()
    sizes: tuple[ReturnedSize, ...] = ()
    parts: tuple[Part, ...] = ()
    given: int = 0
    look_ups: LookUps | None = None

    def looked_up(self, args: Sequence[Any]) -> tuple[Any, ...] | None:
        """What is looked up in a call's arguments; None where it does not fit the block."""
        if self.look_ups is None:
            return ()
        return self.look_ups.of(args, args[self.ids].shape[-1])


def layout_of(
    canonical: Canonical,
    plan: Plan,
    written: tuple[Argument, ...],
    own: Sequence[int],
    parts: Mapping[int, Part],
) -> Layout:
    """The layout of a planned graph.

    ``own``: arguments that are the model's, not the call's; ``parts``: what the last inputs of the
    captured graph are parts of, by position.
    """
    keys, values = plan.sites[-1].writes
    nodes = {node.name: node for node in canonical.gm.graph.nodes}
    argument = {
        given.name: at for given, at in zip(canonical.inputs, canonical.arguments, strict=True)
    }
    index = None if keys.index is None else part(canonical.gm, nodes[keys.index])
    if index is not None:
        no_constant_sizes(index.gm)
    return Layout(
        inputs=canonical.inputs,
        arguments=canonical.arguments,
        ids=argument[plan.ids].position,
        slots=tuple(slot for pair in plan.slots for slot in pair),
        past=keys.past,
        past_dim=keys.token_dim,
        past_values=values.past,
        values_dim=values.token_dim,
        pasts=_pasts(plan, argument),
        index=index,
        written=written,
        masked=index is not None and _hides(canonical, plan, index),
        causal=any(is_causal(canonical.gm, site) for site in plan.sites),
        buffers=(*_buffers(canonical, plan, {*own} - {each.position for each in written}), *parts),
        parts=tuple(parts.values()),
        key_program=key_program(canonical.gm, (w for site in plan.sites for w in site.writes)),
        vocabulary=_vocabulary(canonical.axes.entry),
        held=_held(plan, argument),
    )


def _pasts(plan: Plan, argument: dict[str, Argument]) -> tuple[tuple[Argument, int], ...]:
    writes = [write for site in plan.sites for write in site.writes]
    found = [(argument[w.past], w.token_dim) for w in writes if w.past is not None]
    return tuple(found) if len(found) == len(writes) else ()


def _held(plan: Plan, argument: dict[str, Argument]) -> tuple[Held, ...]:
    pairs = [
        (write, slot)
        for site, slots in zip(plan.sites, plan.slots, strict=True)
        for write, slot in zip(site.writes, slots, strict=True)
    ]
    return tuple(
        Held(argument[write.past], write.past, slot.name, write.token_dim)
        for write, slot in pairs
        if slot.held and write.past is not None
    )


def _hides(canonical: Canonical, plan: Plan, index: Half) -> bool:
    """Whether the last layer's mask comes of more than the places that the block takes."""
    mask = plan.sites[-1].mask
    node = next((node for node in canonical.gm.graph.nodes if node.name == mask), None)
    if node is None:
        return False
    pasts = {write.past for site in plan.sites for write in site.writes}
    return bool({*part(canonical.gm, node).inputs} - pasts - {*index.inputs})


def _buffers(canonical: Canonical, plan: Plan, own: set[int]) -> tuple[int, ...]:
    """Arguments that are the model's own: neither weights, nor a cache, nor sized by the call."""
    pasts = {write.past for site in plan.sites for write in site.writes}
    pairs = zip(canonical.inputs, canonical.arguments, strict=True)
    return tuple(
        argument.position
        for given, argument in pairs
        if argument.position in own
        and not (given.parameter or given.symbolic or given.name in pasts)
    )


def _vocabulary(entry: Entry | None) -> int | None:
    """Rows of the embedding; None where ranks share them out."""
    assert entry is not None
    table, lookup = operands(entry.embedding)[0], entry.embedding.target
    whole = lookup is torch.ops.aten.embedding.default and not table.meta.get("shard")
    return int(tensor_of(table).shape[0]) if whole else None
