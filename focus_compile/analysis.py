"""One Dynamo graph, from its capture to the cut: every stage in one object."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.fx import GraphModule

from focus_compile.axes import graph_inputs, tensor_of
from focus_compile.breaks import GraphBreak
from focus_compile.canonical import Canonical, canonicalize
from focus_compile.capture import capture
from focus_compile.cut import Halves, cut, part
from focus_compile.errors import EmptyCall, NothingToEvict, Unsupported
from focus_compile.grow import grow
from focus_compile.identity import key_program
from focus_compile.inputs import Input
from focus_compile.labels import token_ids
from focus_compile.own_masks import is_causal
from focus_compile.plan import Plan, make_plan, slot_name
from focus_compile.refusals import GOES_ON_BEHIND_A_BREAK, INTERNAL_ERROR, ONE_TOKEN, WRITES_TOKENS
from focus_compile.rewrite import rewrite
from focus_compile.rules import operands
from focus_compile.runtime import Layout
from focus_compile.torch_private import is_module_state
from focus_compile.verify import no_constant_sizes
from focus_compile.window import widen

__all__ = ["Analysis", "analyze"]


@dataclass(frozen=True, repr=False)
class Analysis:
    """All that is known of one captured graph: its stages from capture to the cut."""

    captured: GraphModule
    canonical: Canonical
    plan: Plan
    stages: tuple[tuple[str, GraphModule], ...]
    halves: Halves
    layout: Layout

    @property
    def inputs(self) -> tuple[Input, ...]:
        """Every input that the programs may have, live values at the cut excepted."""
        return (*self.canonical.inputs, *self.plan.inputs.values())


def analyze(gm: GraphModule, broke: GraphBreak | None = None) -> Analysis:
    """Capture, label, plan, rewrite and cut one Dynamo graph; ``broke``: what ended it, if not the
    end of the function that Dynamo captured.

    Raises:
        Unsupported: FOCUS cannot be applied soundly, or the analysis itself fails.
        EmptyCall: there are no token ids.
    """
    try:
        return _analyze(gm, broke)
    except (Unsupported, EmptyCall):
        raise
    except Exception as error:
        kind = type(error).__name__
        raise Unsupported(INTERNAL_ERROR, kind=kind, error=error) from error


def _analyze(gm: GraphModule, broke: GraphBreak | None) -> Analysis:
    captured, written = capture(gm)
    entry = token_ids(captured)
    if entry is not None and 0 in (shape := tensor_of(entry[1]).shape):
        raise EmptyCall(tuple(shape))
    if entry is not None and isinstance(shape[-1], int) and shape[-1] == 1:
        raise NothingToEvict(ONE_TOKEN, entry[0])  # its axis is nowhere to be seen
    widened, last = widen(grow(captured))
    canonical = canonicalize(widened)
    plan = make_plan(canonical)
    stages = tuple(rewrite(canonical.gm, plan))
    own = [index for index, node in enumerate(graph_inputs(gm)) if is_module_state(node)]
    layout = _layout(canonical, plan, written, own)
    halves = cut(stages[-1][1], plan, last)
    first = len(halves.own) - len(written)
    if any(value is not None and value.tokens is not None for value in halves.own[first:]):
        raise Unsupported(WRITES_TOKENS)
    if broke is not None:
        _refuse_holes(halves, broke)
    return Analysis(captured, canonical, plan, stages, halves, layout)


def _refuse_holes(halves: Halves, broke: GraphBreak) -> None:
    """Whatever follows a graph break would take rows of evicted tokens, all zero, for theirs.

    Logits are the caller's to choose among; layers, norms and heads are not.
    """
    for index, own in enumerate(halves.own):
        if own is not None and own.tokens is not None and index not in halves.vocabulary:
            raise Unsupported(GOES_ON_BEHIND_A_BREAK, broke=broke)


def _layout(
    canonical: Canonical, plan: Plan, written: tuple[int, ...], own: Sequence[int]
) -> Layout:
    """``own``: arguments that are the model's, not the call's."""
    keys = plan.sites[-1].writes[0]
    nodes = {node.name: node for node in canonical.gm.graph.nodes}
    names = [slot_name(site.layer, part) for site in plan.sites for part in (0, 1)]
    index = None if keys.index is None else part(canonical.gm, nodes[keys.index])
    if index is not None:
        no_constant_sizes(index.gm)
    return Layout(
        inputs=canonical.inputs,
        arguments=canonical.arguments,
        ids=plan.ids,
        slots=tuple(plan.inputs[name] for name in names),
        past=keys.past,
        past_dim=keys.token_dim,
        index=index,
        written=written,
        causal=any(is_causal(canonical.gm, site) for site in plan.sites),
        buffers=_buffers(canonical, plan, {*own} - {*written}),
        key_program=key_program(canonical.gm, (w for site in plan.sites for w in site.writes)),
        vocabulary=_vocabulary(canonical.gm),
    )


def _buffers(canonical: Canonical, plan: Plan, own: set[int]) -> tuple[int, ...]:
    """Arguments that are the model's own: neither weights, nor a cache, nor sized by the call."""
    pasts = {write.past for site in plan.sites for write in site.writes}
    pairs = zip(canonical.inputs, canonical.arguments, strict=True)
    return tuple(
        argument
        for given, argument in pairs
        if argument in own and not (given.parameter or given.symbolic or given.name in pasts)
    )


def _vocabulary(gm: GraphModule) -> int | None:
    """Rows of the embedding; None where ranks share them out."""
    found = token_ids(gm)
    assert found is not None
    table = operands(found[0])[0]
    whole = found[0].target is torch.ops.aten.embedding.default and not table.meta.get("shard")
    return int(tensor_of(table).shape[0]) if whole else None
