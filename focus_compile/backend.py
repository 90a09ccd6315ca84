"""The backend: ``torch.compile(model, backend="focus", options={...})``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._inductor.compile_fx import compile_fx
from torch.fx import GraphModule, Node

from focus_compile.axes import AxisMap, Role, graph_inputs, tensor_of
from focus_compile.capture import analyzed, capture
from focus_compile.config import FocusConfig
from focus_compile.cut import Halves, cut
from focus_compile.errors import Unsupported
from focus_compile.passes.narrow import slot_name
from focus_compile.plan import Plan, make_plan
from focus_compile.programs import Inner
from focus_compile.rewrite import rewrite
from focus_compile.rules import cat_parts
from focus_compile.runtime import BATCH, TOKENS, Executable, Layout

__all__ = ["Analysis", "analyze", "focus_backend"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Analysis:
    """All that is known of one captured graph: its stages from capture to the cut."""

    captured: GraphModule
    canonical: GraphModule
    axes: AxisMap
    plan: Plan
    stages: tuple[tuple[str, GraphModule], ...]
    halves: Halves
    layout: Layout


def focus_backend(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
    inner: Inner = compile_fx,
) -> Callable[..., Any]:
    """Compile one Dynamo graph: dense, and, where FOCUS applies, prefix and suffix.

    Args:
        gm: Dynamo's graph; example_inputs: its inputs.
        options: see :class:`~focus_compile.config.FocusConfig`.
        mode: as in ``torch.compile``; the same as ``options={"mode": mode}``.
        inner: compiles each program; Inductor by default.

    Raises:
        ValueError: an option is unknown or out of range.
        Unsupported: the graph is refused, and ``options["strict"]`` is set.
    """
    config = FocusConfig.from_options({**(options or {}), **({"mode": mode} if mode else {})})
    patches = config.patches()

    def compile_inner(graph: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        return (
            inner(graph, inputs, config_patches=patches)
            if inner is compile_fx
            else inner(graph, inputs)
        )

    try:
        analysis = analyze(gm)
    except Unsupported as refusal:
        if config.strict:
            raise
        torch._logging.warning_once(
            log, "backend 'focus' compiles this graph unchanged: %s", refusal
        )
        return compile_inner(gm, example_inputs)
    dense = compile_inner(gm, example_inputs)
    return Executable(dense, analysis.halves, analysis.layout, config, compile_inner)


def analyze(gm: GraphModule) -> Analysis:
    """Capture, label, plan, rewrite and cut one Dynamo graph.

    Raises:
        Unsupported: FOCUS cannot be applied soundly.
    """
    captured = capture(gm)
    canonical, axes, arguments = analyzed(captured)
    plan = make_plan(canonical, axes)
    stages = rewrite(canonical, plan)
    layout = _layout(canonical, axes, plan, arguments)
    return Analysis(captured, canonical, axes, plan, tuple(stages), cut(stages[-1][1]), layout)


def _layout(gm: GraphModule, axes: AxisMap, plan: Plan, arguments: tuple[int, ...]) -> Layout:
    nodes = {node.name: node for node in gm.graph.nodes}
    dense, past = set(), set()
    for node in graph_inputs(gm):
        value = tensor_of(node)
        symbolic = any(isinstance(size, torch.SymInt) for size in value.shape)
        if symbolic:
            (dense if value.is_contiguous() else past).add(node.name)
    slots = []
    for site in plan.sites:
        for part, write in enumerate(site.writes):
            value = tensor_of(nodes[write.new])
            shape = []
            for dim, size in zip(axes.of(nodes[write.new]), value.shape, strict=True):
                role = dim[0].role if len(dim) == 1 else None
                shape.append({Role.BATCH: BATCH, Role.TOKEN: TOKENS}.get(role, size))
            slots.append((slot_name(site.layer, part), value.dtype, tuple(shape)))
    return Layout(
        arguments=arguments,
        dense_inputs=frozenset(dense),
        last_dim_inputs=frozenset(past),
        ids=plan.ids,
        slots=tuple(slots),
        token_dims=tuple(
            (k.token_dim, v.token_dim) for k, v in (site.writes for site in plan.sites)
        ),
        past=_past_keys(plan, nodes),
    )


def _past_keys(plan: Plan, nodes: Mapping[str, Node]) -> str | None:
    """The input that holds the last layer's past keys; None without a cache."""
    write = plan.sites[-1].writes[0]
    if write.cat is None:
        return None
    past = cat_parts(nodes[write.cat])[0]
    return past.name if past.op == "placeholder" else None
