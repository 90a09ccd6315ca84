"""An analysis as plain data and text: what explain prints and saves, and what traces carry."""

from __future__ import annotations

import difflib
import re
from typing import Any

from torch.fx import GraphModule, Node

from focus_compile.analysis import Analysis
from focus_compile.axes.axes import AxisMap, Dim
from focus_compile.graph.nodes import graph_inputs
from focus_compile.graph.sizes import Extent, is_generic, name_of
from focus_compile.plan.causal import is_causal
from focus_compile.plan.domains import Place
from focus_compile.plan.plan import Plan
from focus_compile.plan.sites import Site
from focus_compile.programs.halves import Half

__all__ = ["code", "describe", "difference", "legend"]


def describe(analysis: Analysis) -> dict[str, Any]:
    """What the passes found and did, ready for JSON.

    ``sites``: attention sites in layer order; ``inputs``: labelled inputs of the canonical graph;
    ``values``: axis labels of all others; ``live``: values that pass from prefix to suffix, with
    their domain; ``packed``: domain of every packed value; ``shapes``: inputs of prefix and suffix
    whose sizes are known when they are called, by the names of these sizes (``fed`` and
    ``retained`` tokens of the batch, ``fed_row`` and ``retained_row`` the most of one row);
    ``passes``: nodes of the graph, and ``focus::`` operators among them, after each.
    """
    plan, canonical = analysis.plan, analysis.canonical
    nodes = {node.name: node for node in canonical.gm.graph.nodes}
    inputs = {node.name: labels(canonical.axes, node) for node in graph_inputs(canonical.gm)}
    halves = analysis.halves
    live = [name for name in halves.suffix.inputs if name in halves.prefix.outputs]
    stages = [("canonical", canonical.gm), *analysis.stages]
    return {
        "sites": [
            {
                "layer": site.layer,
                "module": site.module,
                "query": labels(canonical.axes, nodes[site.query]),
                "mask": site.mask,
                "causal": is_causal(canonical.gm, site),
                "scale": site.scale,
                "write": _write(site),
            }
            for site in plan.sites
        ],
        "inputs": {
            name: text for name, text in inputs.items() if "batch" in text or "token" in text
        },
        "values": {
            node.name: labels(canonical.axes, node)
            for node in canonical.gm.graph.nodes
            if node.op == "call_function" and node in canonical.axes.dims
        },
        "ranks": 1 if plan.heads is None else plan.heads.ranks,
        "live": {name: _domain(plan, name) for name in live},
        "shapes": {
            "prefix": _shapes(analysis, halves.prefix),
            "suffix": _shapes(analysis, halves.suffix),
        },
        "packed": {name: place.domain.value for name, place in plan.packed.items()},
        "passes": [
            {"name": name, "nodes": len(gm.graph.nodes), "focus_operators": _operators(gm)}
            for name, gm in stages
        ],
    }


def _shapes(analysis: Analysis, half: Half) -> dict[str, str]:
    specs = {spec.name: spec for spec in analysis.inputs}
    listed = [specs[name] for name in half.inputs if name in specs]
    return {spec.name: _shape(spec.shape) for spec in listed if spec.symbolic}


def _shape(extents: tuple[Extent, ...]) -> str:
    return f"[{', '.join(_extent(extent) for extent in extents)}]"


def _extent(extent: Extent) -> str:
    return "+".join(map(_extent, extent)) if isinstance(extent, tuple) else str(extent)


def code(gm: GraphModule) -> str:
    """A graph as the Python that it stands for, with shapes."""
    text: str = gm.print_readable(print_output=False, include_stride=False, include_device=False)
    return text


def difference(analysis: Analysis) -> str:
    """What the passes changed: unified diff of the canonical graph and the last stage's."""
    before, after = code(analysis.canonical.gm), code(analysis.stages[-1][1])
    lines = difflib.unified_diff(
        before.splitlines(), after.splitlines(), "canonical", analysis.stages[-1][0], lineterm=""
    )
    return "\n".join(lines) + "\n"


def legend(text: str) -> str:
    """What the numbers that stand for sizes mean, for the head of a file that holds ``text``."""
    numbers = sorted({int(digits) for digits in re.findall(r"\b\d{5}\b", text)})
    named = [(number, name_of(number)) for number in numbers]
    lines = [f"#   {number}  {name}\n" for number, name in named if name is not None]
    if not lines:
        return ""
    return (
        "# Sizes that vary from call to call are written as numbers that stand for them,\n"
        "# their sums and products likewise:\n" + "".join(lines)
    )


def labels(axes: AxisMap, node: Node) -> str:
    """Axis labels of a value, as text: ``[batch, token, 48]``."""
    return f"[{', '.join(_dim(axes, dim) for dim in axes.of(node))}]"


def _dim(axes: AxisMap, dim: Dim) -> str:
    names = []
    for axis in axes.resolve(dim):
        if axis.role is not None:
            names.append(axis.role.value)
        elif axis.sum is not None and axes.history(dim) is not None:
            names.append("history+token")
        else:
            names.append("history" if is_generic(int(axis.size)) else str(axis.size))
    return "*".join(names) or "1"


def _operators(gm: GraphModule) -> int:
    return sum(str(node.target).startswith("focus.") for node in gm.graph.nodes)


def _write(site: Site) -> str:
    if site.writes[0].cat is None:
        return "none: keys are the block's own"
    return "replaces slots" if site.writes[0].index else "cat with the history"


def _domain(plan: Plan, name: str) -> str:
    place: Place | None = plan.packed.get(name)
    return place.domain.value if place is not None else "canvas"
