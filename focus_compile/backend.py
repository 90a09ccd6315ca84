"""The backend: ``torch.compile(model, backend="focus", options={...})``."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.fx import GraphModule

from focus_compile.analysis import Analysis, analyze
from focus_compile.capture.breaks import graph_break
from focus_compile.capture.capture import has_attention
from focus_compile.capture.modes import refuse_modes
from focus_compile.compiling import compiling
from focus_compile.config import FocusConfig
from focus_compile.errors import NothingToEvict, Unsupported
from focus_compile.graph.recompute import set_input_values
from focus_compile.log import warning_once
from focus_compile.programs.lower import drop_unread, lower, stay
from focus_compile.programs.program import Inner, make_programs
from focus_compile.runtime.executable import Executable
from focus_compile.runtime.record import Record
from focus_compile.runtime.unchanged import Unchanged
from focus_compile.torch_private import (
    at_fixed_addresses,
    compile_fx,
    frame_compile_id,
    recompile_limit,
)
from focus_compile.views.describe import difference
from focus_compile.views.trace import trace_analysis, trace_refusal

__all__ = ["focus_backend"]

log = logging.getLogger(__name__)


def focus_backend(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
    inner: Inner | None = None,
    record: Record | None = None,
) -> Callable[..., Any]:
    """Compile one Dynamo graph: dense, and, where FOCUS applies, prefix and suffix.

    Args:
        gm: Dynamo's graph; example_inputs: its inputs.
        options: see :class:`~focus_compile.config.FocusConfig`.
        mode: as in ``torch.compile``; the same as ``options={"mode": mode}``.
        inner: compiles each program; None is Inductor.
        record: counts what becomes of it.

    Raises:
        ValueError: an option is unknown or out of range.
        Unsupported: the graph is refused, and ``options["strict"]`` is set.
    """
    config = FocusConfig.from_options({**(options or {}), **({"mode": mode} if mode else {})})
    patches = config.patches()
    record = record or Record()

    def compile_inner(graph: GraphModule, inputs: Sequence[Any], **more: Any) -> Callable[..., Any]:
        with record.compiling():
            if inner is not None:
                return inner(graph, inputs)
            compiled: Any = compile_fx(graph, inputs, config_patches=patches, **more)
            return compiled  # type: ignore[no-any-return]

    def compile_half(graph: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        if inner is not None:
            return compile_inner(set_input_values(graph, inputs), inputs)
        captured = config.captures(value.device for value in inputs)
        lowered = lower(graph, captured=captured)
        if not captured:
            return compile_inner(set_input_values(lowered, inputs), inputs)
        used = drop_unread(lowered, graph)  # an input on the CPU would keep CUDA graphs away
        read_inputs = [inputs[index] for index in used]
        fixed = at_fixed_addresses(stay(lowered, read_inputs))
        read_lowered = set_input_values(lowered, read_inputs)
        compiled = compile_inner(read_lowered, read_inputs, inner_compile=fixed)
        return lambda *args: compiled(*(args[index] for index in used))

    _report_recompile_limit()
    # Inductor takes ownership of the graph, and must see it before the analysis leaves traces in
    # Dynamo's shape environment: then the dense program has the same cache key as plain Inductor's.
    copied, broke = GraphModule(gm, copy.deepcopy(gm.graph)), graph_break(gm)
    with compiling("the dense program", len(gm.graph.nodes)):
        dense = compile_inner(gm, example_inputs)
    try:
        if not has_attention(copied):
            log.debug("no attention in this graph of %d nodes: unchanged", len(copied.graph.nodes))
            return dense
        refuse_modes(example_inputs)
        with record.compiling(), compiling("the analysis", len(copied.graph.nodes)):
            analysis = analyze(copied, broke, config.layers)
    except NothingToEvict:
        return Unchanged(dense)
    except Unsupported as refusal:
        trace_refusal(refusal)
        record.graph(str(refusal))
        if config.strict:
            raise
        warning_once(
            log,
            "backend 'focus' leaves this graph as it is: %s. What to do: %s",
            refusal,
            refusal.cure,
        )
        return Unchanged(dense)
    trace_analysis(analysis)
    record.graph()
    _log_passes(analysis)
    programs = make_programs(analysis.halves, analysis.inputs, compile_half)
    return Executable(
        dense,
        analysis.halves,
        analysis.layout,
        config,
        programs,
        record,
        returns=broke is None,
    )


def _log_passes(analysis: Analysis) -> None:
    """What ``TORCH_LOGS="+focus_compile"`` shows of a graph."""
    if not log.isEnabledFor(logging.DEBUG):
        return
    stages = [("canonical", analysis.canonical.gm), *analysis.stages]
    for name, gm in stages:
        log.debug("%s: %d nodes", name, len(gm.graph.nodes))
    log.debug("what the passes changed:\n%s", difference(analysis))


def _report_recompile_limit() -> None:
    """Say so when this is the last graph that Dynamo compiles of a function."""
    limit = recompile_limit()
    if frame_compile_id() == limit - 1:
        warning_once(
            log,
            "this is the last of %d graphs that Dynamo compiles of this function; later calls that "
            "match none of them run eagerly. Pass the same kinds of arguments in every call, or "
            "raise torch._dynamo.config.recompile_limit",
            limit,
        )
