"""What the backend makes of a model, graph by graph."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from torch.fx import Graph, GraphModule, Node

from focus_compile.analysis import Analysis, analyze
from focus_compile.capture.breaks import GraphBreak, graph_break, reported_break
from focus_compile.capture.capture import has_attention
from focus_compile.errors import Unsupported
from focus_compile.graph.nodes import graph_outputs
from focus_compile.models.mask_token import find_mask_token
from focus_compile.reports.measure import Measured, measure, with_fresh_code
from focus_compile.reports.terminal import render
from focus_compile.torch_private import reported_breaks
from focus_compile.views.cost import Cost, cost_of
from focus_compile.views.describe import describe
from focus_compile.views.files import save_analysis, save_refusal

__all__ = ["Explanation", "GraphReport", "explain"]


@dataclass(frozen=True, repr=False)
class GraphReport:
    """One graph that Dynamo captured.

    Attributes:
        graph: Dynamo's graph; attention: whether there is any to apply FOCUS to.
        sizes: of the call, by name: ``batch``, ``token``, ``history``, as far as inputs tell.
        refusal: why FOCUS was not applied, or None.
        analysis: the graph at every stage, where FOCUS was applied.
        cost: FLOPs and bytes per step as formulas, likewise.
        broke: why Dynamo ended the graph before the model's own end, or None.
        pickled: :meth:`to_dict` of the report that this one was pickled from, else None. Graphs are
            left out of a pickle: ``graph`` is empty then, and ``analysis`` None.
    """

    graph: GraphModule
    attention: bool
    sizes: Mapping[str, int] = field(default_factory=dict)
    refusal: Unsupported | None = None
    analysis: Analysis | None = None
    cost: Cost | None = None
    broke: GraphBreak | None = None
    pickled: Mapping[str, Any] | None = None

    def __repr__(self) -> str:
        outcome = "applied" if self.analysis is not None else self.refusal or "no attention"
        return f"<GraphReport: {self.nodes} nodes; {outcome}>"

    @property
    def nodes(self) -> int:
        """Nodes of Dynamo's graph."""
        return len(self.graph.graph.nodes) if self.pickled is None else int(self.pickled["nodes"])

    @property
    def applied(self) -> bool:
        """Whether FOCUS was applied."""
        return self.cost is not None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"graph": None, "analysis": None, "pickled": self.to_dict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, graph=GraphModule(nn.Module(), Graph()))

    def __copy__(self) -> GraphReport:
        return self  # frozen

    def __deepcopy__(self, _: Any) -> GraphReport:
        return self

    def to_dict(self) -> dict[str, Any]:
        """Plain data; ``flops`` and ``bytes`` are formulas in the symbols of
        :mod:`focus_compile.views.cost`.
        """
        if self.pickled is not None:
            return copy.deepcopy(dict(self.pickled))
        refusal, broke, cost = self.refusal, self.broke, self.cost
        flops = moved = None
        if cost is not None:
            flops = {"dense": str(cost.dense), "focus": str(cost.focus)}
            moved = {"dense": str(cost.dense_bytes), "focus": str(cost.focus_bytes)}
        return {
            "nodes": self.nodes,
            "attention": self.attention,
            "sizes": dict(self.sizes),
            "refusal": None if refusal is None else refusal.to_dict(),
            "break": None if broke is None else asdict(broke),
            "flops": flops,
            "bytes": moved,
            "analysis": None if self.analysis is None else describe(self.analysis),
        }


@dataclass(repr=False)
class Explanation:
    """The whole story of one call of a model; ``print`` it, ``save`` it, or read its parts.

    ``skipped``: graph breaks for which Dynamo ran a whole function eagerly, what it calls captured
    apart: no graph ends at them. ``measured``: what a real run gave, where :func:`explain` was
    asked for one.
    """

    graphs: list[GraphReport] = field(default_factory=list)
    skipped: list[GraphBreak] = field(default_factory=list)
    measured: Measured | None = None

    def __repr__(self) -> str:
        return (
            f"<Explanation: FOCUS applied: {'yes' if self.applied else 'no'}; graphs: "
            f"{len(self.graphs)}, refusals: {len(self.refusals)}, graph breaks: "
            f"{len(self.breaks)}; print(...) tells the whole story>"
        )

    @property
    def applied(self) -> bool:
        """Whether FOCUS was applied to any graph."""
        return any(graph.applied for graph in self.graphs)

    @property
    def refusals(self) -> list[Unsupported]:
        return [graph.refusal for graph in self.graphs if graph.refusal is not None]

    @property
    def breaks(self) -> list[GraphBreak]:
        """Graph breaks, in order, those of skipped functions last: the first is to be removed."""
        return [graph.broke for graph in self.graphs if graph.broke is not None] + self.skipped

    def __str__(self) -> str:
        buffer = io.StringIO()
        render(Console(width=100, file=buffer, color_system=None), self.to_dict())
        return buffer.getvalue()

    def print(self) -> None:
        """Print to the terminal."""
        render(Console(), self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data: one entry of ``graphs`` for each graph, in order."""
        measured = None if self.measured is None else self.measured.to_dict()
        graphs = [graph.to_dict() for graph in self.graphs]
        skipped = [asdict(broke) for broke in self.skipped]
        data = {"applied": self.applied, "skipped": skipped, "graphs": graphs}
        return data | {"measured": measured}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1)

    def save(self, folder: str | Path) -> Path:
        """Write ``explanation.txt``, ``explanation.json``, and what
        :mod:`focus_compile.views.files` makes of each graph: code, difference, DOT and ``.pt2``
        files, or a script that shows a refusal; a pickled explanation has no graphs.
        """
        root = Path(folder)
        root.mkdir(parents=True, exist_ok=True)
        (root / "explanation.txt").write_text(str(self))
        (root / "explanation.json").write_text(self.to_json() + "\n")
        for index, graph in enumerate(self.graphs):
            if graph.analysis is not None:
                save_analysis(graph.analysis, root, f"graph{index}")
            elif graph.refusal is not None and graph.pickled is None:
                save_refusal(graph.graph, graph.refusal, root, f"graph{index}")
        return root


def explain(
    model: Callable[..., Any],
    *args: Any,
    run: bool = False,
    mask_token_id: int | None = None,
    **kwargs: Any,
) -> Explanation:
    """Capture a call of ``model`` as the backend would, and tell what FOCUS does with it.

    Args:
        model: a module, or a function that calls one; args, kwargs: of one denoising call. They are
            copied, and nothing is computed: graphs return empty tensors.
        run: also run the call, eager and compiled by Inductor, and compare
            (:class:`~focus_compile.reports.measure.Measured`).
        mask_token_id: tells the masked tokens of that run; looked up as
            :func:`focus_compile.compile` does where it is None.

    Returns:
        the :class:`Explanation`; refusals are part of it, not raised.

    Raises:
        ValueError: ``run`` without a mask token.
    """
    story = Explanation()

    def record(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        graph = GraphModule(gm, copy.deepcopy(gm.graph))
        broke = graph_break(gm)
        story.graphs.append(replace(_report(gm, graph, example_inputs, broke), broke=broke))
        outputs = [_empty(node) for node in graph_outputs(gm)]
        return lambda *_: [make() for make in outputs]

    if run and mask_token_id is None:
        if not isinstance(model, nn.Module):
            raise ValueError("give mask_token_id=...: the model is a function")
        mask_token_id = find_mask_token(model)
    compiled = torch.compile(with_fresh_code(model), backend=record)
    with torch.no_grad(), reported_breaks() as reports:
        compiled(*copy.deepcopy(args), **copy.deepcopy(kwargs))
    known = {broke.line for broke in story.breaks}
    for broke in filter(None, map(reported_break, reports)):
        if broke.line not in known:
            known.add(broke.line)
            story.skipped.append(broke)
    if run and story.applied:
        assert mask_token_id is not None
        story.measured = measure(model, args, kwargs, mask_token_id)
    return story


def _report(
    gm: GraphModule, graph: GraphModule, example_inputs: Sequence[Any], broke: GraphBreak | None
) -> GraphReport:
    """``graph``: a copy of ``gm``, which the analysis may annotate."""
    if not has_attention(gm):
        return GraphReport(graph, attention=False)
    try:
        analysis = analyze(gm, broke)
    except Unsupported as refusal:
        return GraphReport(graph, attention=True, refusal=refusal)
    return GraphReport(
        graph,
        attention=True,
        sizes=_sizes(analysis, example_inputs),
        analysis=analysis,
        cost=cost_of(analysis.canonical, analysis.plan),
    )


def _sizes(analysis: Analysis, example_inputs: Sequence[Any]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    canonical = analysis.canonical
    for spec, argument in zip(canonical.inputs, canonical.arguments, strict=True):
        for dim, extent in enumerate(spec.shape):
            if isinstance(extent, str):
                sizes[extent] = int(argument.of(example_inputs).shape[dim])
    return sizes


def _empty(node: Any) -> Callable[[], Any]:
    """A maker of an empty value like the one that an output of Dynamo's graph would have."""
    if not isinstance(node, Node):
        return lambda: node
    value = node.meta["example_value"]
    if not isinstance(value, torch.Tensor):
        return lambda: int(value)
    shape = [int(size) for size in value.shape]
    return lambda: torch.zeros(shape, dtype=value.dtype, device=value.device)
