"""One Dynamo graph, from its capture to the cut: every stage in one object."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import GraphModule

from focus_compile.axes import tensor_of
from focus_compile.breaks import GraphBreak
from focus_compile.canonical import Canonical, canonicalize
from focus_compile.capture import capture
from focus_compile.cut import Halves, cut, part
from focus_compile.errors import EmptyCall, NothingToEvict, Unsupported
from focus_compile.grow import grow
from focus_compile.inputs import Input
from focus_compile.labels import token_ids
from focus_compile.own_masks import is_causal
from focus_compile.plan import Plan, make_plan, slot_name
from focus_compile.rewrite import rewrite
from focus_compile.runtime import Layout
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
        reason = f"internal error, please report it: {type(error).__name__}: {error}"
        raise Unsupported(reason) from error


def _analyze(gm: GraphModule, broke: GraphBreak | None) -> Analysis:
    captured, written = capture(gm)
    entry = token_ids(captured)
    if entry is not None and 0 in (shape := tensor_of(entry[1]).shape):
        raise EmptyCall(tuple(shape))
    if entry is not None and isinstance(shape[-1], int) and shape[-1] == 1:
        raise NothingToEvict("the block has one token", entry[0])  # its axis is nowhere to be seen
    widened, last = widen(grow(captured))
    canonical = canonicalize(widened)
    plan = make_plan(canonical)
    stages = tuple(rewrite(canonical.gm, plan))
    layout = _layout(canonical, plan, written)
    halves = cut(stages[-1][1], plan, last)
    own = len(halves.own) - len(written)
    if any(value is not None and value.tokens is not None for value in halves.own[own:]):
        raise Unsupported("the model writes what it computes of tokens into an input")
    if broke is not None:
        _refuse_holes(halves, broke)
    return Analysis(captured, canonical, plan, stages, halves, layout)


def _refuse_holes(halves: Halves, broke: GraphBreak) -> None:
    """Whatever follows a graph break would take rows of evicted tokens, all zero, for theirs.

    Logits are the caller's to choose among; layers, norms and heads are not.
    """
    for index, own in enumerate(halves.own):
        if own is not None and own.tokens is not None and index not in halves.vocabulary:
            raise Unsupported(
                "the model goes on behind a graph break with what it computed of tokens, where "
                f"evicted ones would be rows of zeros: {broke}"
            )


def _layout(canonical: Canonical, plan: Plan, written: tuple[int, ...]) -> Layout:
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
    )
