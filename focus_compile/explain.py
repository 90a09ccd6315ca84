"""What the backend makes of a model, graph by graph, without running the model."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch.fx import GraphModule, Node

from focus_compile.analysis import Analysis, analyze
from focus_compile.axes import graph_outputs
from focus_compile.backend import has_attention
from focus_compile.breaks import GraphBreak, graph_break
from focus_compile.cost import Cost, cost_of
from focus_compile.describe import code, describe, difference
from focus_compile.errors import Unsupported

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

    def to_dict(self) -> dict[str, Any]:
        """Plain data; ``flops`` are formulas in the symbols of :mod:`focus_compile.cost`."""
        refusal, broke, cost = self.refusal, self.broke, self.cost
        return {
            "nodes": self.nodes,
            "attention": self.attention,
            "refusal": None if refusal is None else refusal.to_dict(),
            "break": None if broke is None else asdict(broke),
            "flops": None if cost is None else {"dense": str(cost.dense), "focus": str(cost.focus)},
            "analysis": None if self.analysis is None else describe(self.analysis),
        }


@dataclass
class Explanation:
    """The whole story of one call of a model; ``print`` it, ``save`` it, or read its parts."""

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

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data: one entry of ``graphs`` for each graph, in order."""
        return {"applied": self.applied, "graphs": [graph.to_dict() for graph in self.graphs]}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1)

    def save(self, folder: str | Path) -> Path:
        """Write ``explanation.txt``, ``explanation.json``, and, for graphs that FOCUS was applied
        to, ``graph<i>_before.py``, ``graph<i>_after.py`` and their difference ``graph<i>.diff``.
        """
        root = Path(folder)
        root.mkdir(parents=True, exist_ok=True)
        (root / "explanation.txt").write_text(str(self))
        (root / "explanation.json").write_text(self.to_json() + "\n")
        for index, graph in enumerate(self.graphs):
            if graph.analysis is not None:
                name, analysis = f"graph{index}", graph.analysis
                (root / f"{name}_before.py").write_text(code(analysis.canonical.gm))
                (root / f"{name}_after.py").write_text(code(analysis.stages[-1][1]))
                (root / f"{name}.diff").write_text(difference(analysis))
        return root

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
    found = describe(analysis)
    sites = Table("layer", "module", "queries", "mask", "K/V write", title="attention sites")
    for site in found["sites"]:
        mask = "yes" if site["mask"] else "causal" if site["causal"] else "none"
        sites.add_row(
            str(site["layer"]), site["module"], escape(site["query"]), mask, site["write"]
        )
    console.print(sites)
    inputs = Table("input", "labels", title="labelled inputs")
    for name, text in found["inputs"].items():
        inputs.add_row(name, escape(text))
    console.print(inputs)
    places = ", ".join(f"{name} ({place})" for name, place in found["live"].items())
    console.print(
        f"the cut: inside layer 1, after its q, k and v; live values: {places}", markup=False
    )
    passes = Table("pass", "nodes", "focus operators", title="passes")
    for stage in found["passes"]:
        passes.add_row(stage["name"], str(stage["nodes"]), str(stage["focus_operators"]))
    console.print(passes)
    console.print(
        "FLOPs per step (B rows, T block, S history, F fed and N retained tokens of the batch)\n"
        f"  dense: {cost.dense}\n  focus: {cost.focus}",
        markup=False,
    )
