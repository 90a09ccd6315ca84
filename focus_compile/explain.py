"""What the backend makes of a model, graph by graph, without running the model."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch.fx import GraphModule, Node

from focus_compile.axes import AxisMap, Dim, graph_inputs, graph_outputs
from focus_compile.backend import Analysis, analyze, has_attention
from focus_compile.breaks import GraphBreak, graph_break
from focus_compile.cost import Cost, cost_of
from focus_compile.errors import Unsupported
from focus_compile.inputs import is_generic
from focus_compile.plan import Place, Plan

__all__ = ["Explanation", "GraphReport", "explain"]


@dataclass(frozen=True)
class GraphReport:
    """One graph that Dynamo captured.

    Attributes:
        nodes: nodes of Dynamo's graph.
        refusal: why FOCUS was not applied, or None; attention: whether there is any to apply it to.
        analysis: the graph at every stage, where FOCUS was applied.
        cost: FLOPs per step as formulas, likewise.
        broke: why Dynamo ended the graph before the model's own end, or None.
    """

    nodes: int
    attention: bool
    refusal: Unsupported | None = None
    analysis: Analysis | None = None
    cost: Cost | None = None
    broke: GraphBreak | None = None


@dataclass
class Explanation:
    """The whole story of one call of a model; ``print`` it, or read its parts."""

    graphs: list[GraphReport] = field(default_factory=list)

    @property
    def applied(self) -> bool:
        """Whether FOCUS was applied to any graph."""
        return any(graph.analysis is not None for graph in self.graphs)

    @property
    def refusals(self) -> list[Unsupported]:
        return [graph.refusal for graph in self.graphs if graph.refusal is not None]

    @property
    def breaks(self) -> list[GraphBreak]:
        """Graph breaks, in order: the first is the one to remove."""
        return [graph.broke for graph in self.graphs if graph.broke is not None]

    def __str__(self) -> str:
        text = io.StringIO()
        self._render(Console(width=100, file=text, color_system=None))
        return text.getvalue()

    def print(self) -> None:
        """Print to the terminal."""
        self._render(Console())

    def _render(self, console: Console) -> None:
        console.print(f"Dynamo captured {len(self.graphs)} graph(s)", markup=False)
        for index, graph in enumerate(self.graphs):
            console.rule(f"graph {index}: {graph.nodes} nodes")
            if graph.refusal is not None:
                console.print(f"refused, compiled unchanged: {graph.refusal}", markup=False)
            elif graph.analysis is None:
                console.print("no attention over tokens: compiled unchanged")
            else:
                assert graph.cost is not None
                _render_graph(console, graph.analysis, graph.cost)
            if graph.broke is not None:
                console.print(f"ended by a graph break: {graph.broke}", markup=False)


def explain(model: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Capture a call of ``model`` as the backend would, and tell what FOCUS does with it.

    Args:
        model: a module, or a function that calls one; args, kwargs: of one denoising call. They are
            copied, and nothing is computed: graphs return empty tensors.

    Returns:
        the :class:`Explanation`; refusals are part of it, not raised.
    """
    story = Explanation()

    def record(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        story.graphs.append(replace(_report(gm), broke=graph_break(gm)))
        outputs = [_empty(node) for node in graph_outputs(gm)]
        return lambda *_: [make() for make in outputs]

    def call(*inner_args: Any, **inner_kwargs: Any) -> Any:
        return model(*inner_args, **inner_kwargs)

    # a code object of its own: Dynamo keeps captures, and counts them, by code object
    call.__code__ = call.__code__.replace()
    compiled = torch.compile(call, backend=record)
    with torch.no_grad():
        compiled(*copy.deepcopy(args), **copy.deepcopy(kwargs))
    return story


def _report(gm: GraphModule) -> GraphReport:
    nodes = len(gm.graph.nodes)
    if not has_attention(gm):
        return GraphReport(nodes, attention=False)
    try:
        analysis = analyze(gm)
    except Unsupported as refusal:
        return GraphReport(nodes, attention=True, refusal=refusal)
    return GraphReport(
        nodes,
        attention=True,
        analysis=analysis,
        cost=cost_of(analysis.canonical, analysis.plan),
    )


def _empty(node: Any) -> Callable[[], Any]:
    """A maker of an empty value like the one that an output of Dynamo's graph would have."""
    if not isinstance(node, Node):
        return lambda: node
    value = node.meta["example_value"]
    if not isinstance(value, torch.Tensor):
        return lambda: int(value)
    shape = [int(size) for size in value.shape]
    return lambda: torch.zeros(shape, dtype=value.dtype, device=value.device)


def _render_graph(console: Console, analysis: Analysis, cost: Cost) -> None:
    plan, canonical = analysis.plan, analysis.canonical
    sites = Table("layer", "module", "queries", "mask", "K/V write", title="attention sites")
    nodes = {node.name: node for node in canonical.gm.graph.nodes}
    for site in plan.sites:
        query = labels(canonical.axes, nodes[site.query])
        write = "cat with the history" if site.writes[0].cat else "none: keys are the block's own"
        mask = "yes" if site.mask else "none"
        sites.add_row(str(site.layer), site.module, escape(query), mask, write)
    console.print(sites)
    inputs = Table("input", "labels", title="labelled inputs")
    for node in graph_inputs(canonical.gm):
        text = labels(canonical.axes, node)
        if any(name in text for name in ("batch", "token")):
            inputs.add_row(node.name, escape(text))
    console.print(inputs)
    console.print(_cut_line(analysis), markup=False)
    passes = Table("pass", "nodes", "focus operators", title="passes")
    passes.add_row("canonical", str(len(canonical.gm.graph.nodes)), "0")
    for name, gm in analysis.stages:
        focus = sum(str(node.target).startswith("focus.") for node in gm.graph.nodes)
        passes.add_row(name, str(len(gm.graph.nodes)), str(focus))
    console.print(passes)
    console.print(
        "FLOPs per step (B rows, T block, S history, F fed and N retained tokens of the batch)\n"
        f"  dense: {cost.dense}\n  focus: {cost.focus}",
        markup=False,
    )


def _cut_line(analysis: Analysis) -> str:
    plan, halves = analysis.plan, analysis.halves
    live = [name for name in halves.suffix.inputs if name in halves.prefix.outputs]
    places = [f"{name} ({_place(plan, name)})" for name in live]
    return f"the cut: inside layer 1, after its q, k and v; live values: {', '.join(places)}"


def _place(plan: Plan, name: str) -> str:
    place: Place | None = plan.packed.get(name)
    return place.domain.value if place is not None else "canvas"


def labels(axes: AxisMap, node: Node) -> str:
    """Axis labels of a value, as text: ``[batch, token, 48]``."""
    return f"[{', '.join(_dim(axes, dim) for dim in axes.of(node))}]"


def _dim(axes: AxisMap, dim: Dim) -> str:
    parts = []
    for axis in axes.resolve(dim):
        if axis.role is not None:
            parts.append(axis.role.value)
        elif axis.sum is not None and axes.history(dim) is not None:
            parts.append("history+token")
        else:
            parts.append("history" if is_generic(int(axis.size)) else str(axis.size))
    return "*".join(parts) or "1"
