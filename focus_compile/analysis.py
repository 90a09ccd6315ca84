"""One Dynamo graph, from its capture to the cut: every stage in one object."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch.fx import GraphModule

from focus_compile.axes.axes import Entry
from focus_compile.axes.embedding import find_entry
from focus_compile.axes.propagate import label
from focus_compile.capture.breaks import GraphBreak
from focus_compile.capture.canonical import Canonical, canonicalize
from focus_compile.capture.capture import capture
from focus_compile.capture.grow import grow
from focus_compile.capture.last_tokens import widen
from focus_compile.capture.looked_up import look_up
from focus_compile.capture.returned_sizes import without_sizes
from focus_compile.capture.unwrap import unwrap
from focus_compile.errors import EmptyCall, NothingToEvict, Unsupported
from focus_compile.graph.inputs import Input
from focus_compile.graph.nodes import graph_inputs, tensor_of
from focus_compile.passes import rewrite
from focus_compile.plan.plan import SCORED, Plan, make_plan, refuse_mutation
from focus_compile.programs.cut import cut
from focus_compile.programs.halves import Halves
from focus_compile.programs.layout import Layout, layout_of
from focus_compile.refusals import (
    GOES_ON_BEHIND_A_BREAK,
    INTERNAL_ERROR,
    LOOKED_UP_IN_WRITTEN,
    ONE_TOKEN,
    WRITES_INPUT,
    WRITES_TOKENS,
)
from focus_compile.torch_private import is_module_state

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
        return (*self.canonical.inputs, *self.plan.inputs)


def analyze(
    gm: GraphModule, broke: GraphBreak | None = None, layers: tuple[int, int] = SCORED
) -> Analysis:
    """Capture, label, plan, rewrite and cut one Dynamo graph; ``broke``: what ended it, if not the
    end of the function that Dynamo captured; ``layers``: whose attention ranks tokens.

    Raises:
        Unsupported: FOCUS cannot be applied soundly, or the analysis itself fails.
        EmptyCall: there are no token ids.
    """
    try:
        return _analyze(gm, broke, layers)
    except (Unsupported, EmptyCall):
        raise
    except Exception as error:
        raise Unsupported(INTERNAL_ERROR, kind=type(error).__name__, error=error) from error


def _analyze(gm: GraphModule, broke: GraphBreak | None, layers: tuple[int, int]) -> Analysis:
    gm, sizes = without_sizes(gm)
    unwrapped = unwrap(gm)
    plain, look_ups = look_up(unwrapped.gm)
    traced = capture(plain)
    captured = traced.gm
    written = tuple(traced.arguments[at] for at in traced.written)
    entry = find_entry(captured)
    if entry is not None:
        _refuse_small(entry)
    refuse_mutation(captured)
    widened, last = widen(grow(label(captured, entry)))
    canonical = canonicalize(widened, traced.held, traced.arguments)
    plan = make_plan(canonical, layers)
    stages = tuple(rewrite(canonical.gm, plan))
    given = graph_inputs(gm)
    if any(argument.position >= len(given) for argument in written):
        raise Unsupported(WRITES_INPUT)
    if look_ups is not None and look_ups.sources & {argument.position for argument in written}:
        raise Unsupported(LOOKED_UP_IN_WRITTEN)
    module_state = [index for index, node in enumerate(given) if is_module_state(node)]
    layout = layout_of(canonical, plan, written, module_state, unwrapped.parts)
    layout = replace(layout, sizes=sizes, given=len(given), look_ups=look_ups)
    if {held.argument for held in layout.held} != {traced.arguments[at] for at in traced.held}:
        raise Unsupported(WRITES_INPUT)
    halves = cut(stages[-1][1], plan, last)
    first_written = len(halves.own) - len(written)
    if any(value is not None and value.domain is not None for value in halves.own[first_written:]):
        raise Unsupported(WRITES_TOKENS)
    if broke is not None:
        _refuse_holes(halves, broke)
    return Analysis(captured, canonical, plan, stages, halves, layout)


def _refuse_small(entry: Entry) -> None:
    shape = tensor_of(entry.ids).shape
    if 0 in shape:
        raise EmptyCall(tuple(shape))
    if isinstance(shape[-1], int) and shape[-1] == 1:
        raise NothingToEvict(ONE_TOKEN, entry.embedding)  # its axis is nowhere to be seen


def _refuse_holes(halves: Halves, broke: GraphBreak) -> None:
    """Whatever follows a graph break would take rows of evicted tokens, all zero, for theirs.

    Logits are the caller's to choose among; layers, norms and heads are not.
    """
    for index, returned in enumerate(halves.own):
        if returned is not None and returned.domain is not None and index not in halves.vocabulary:
            raise Unsupported(GOES_ON_BEHIND_A_BREAK, broke=broke)
