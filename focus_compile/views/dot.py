"""The graph before or after the passes as a picture: DOT text, for Graphviz to lay out.

A picture holds what computes or carries values of tokens: weights (inputs of fixed shape),
constants, sizes and ``getitem`` are left out. Layers that are all alike are one box, so that the
picture of a deep model is as large as that of four layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from focus_compile.analysis import Analysis
from focus_compile.axes.axes import AxisMap, Role
from focus_compile.errors import module_path
from focus_compile.graph.sizes import GENERIC, is_generic
from focus_compile.plan.domains import Domain
from focus_compile.plan.plan import Plan
from focus_compile.torch_private import OpOverload
from focus_compile.views.describe import labels
from focus_compile.views.drawn import flow_of, folded, layer_modules, module_stack, origins

if TYPE_CHECKING:
    import pydot  # needed where a graph is drawn, nowhere else

__all__ = ["AFTER", "BEFORE", "dot"]

BEFORE = {
    "token": "values of the block's tokens",
    "history": "values along the history",
    "other": "neither",
}
"""Classes of nodes in the graph before the passes, with their meaning."""
AFTER = {
    "canvas": "on the canvas: as the caller sees it",
    "fed": "packed rows of fed tokens",
    "retained": "packed rows of retained tokens",
}
"""Classes of nodes in the graph after the passes, with their meaning."""

_FILLS = {
    "token": "#ddd6f3",
    "history": "#c3e4df",
    "other": "#eceff3",
    "canvas": "#eceff3",
    "fed": "#f6d58f",
    "retained": "#a9c9f0",
    "folded": "#ffffff",
}
_FOLDED = "folded layers"  # no node of a graph has a name with a space
_FONT = '"Helvetica,Arial,sans-serif"'
_TOOLTIP = 240
_NAMES = {number: name for name, number in GENERIC.items()}


def dot(analysis: Analysis, after: bool) -> str:
    """DOT text of the graph after the passes, or of the canonical graph before them.

    Nodes have a class, which SVG keeps: one of :data:`BEFORE` or :data:`AFTER`, or ``folded``;
    ``focus`` where the passes put the operator there; ``entry`` where tokens come in. What the
    model returns has a double outline.
    """
    import pydot

    gm = analysis.stages[-1][1] if after else analysis.canonical.gm
    weights = {spec.name for spec in analysis.canonical.inputs if not spec.symbolic}
    flow = flow_of(gm, weights)
    inside = folded(gm, flow, analysis.plan)
    returned = set(origins(gm.graph.output_node(), flow))
    modules = layer_modules(gm, analysis.plan.sites)

    graph = pydot.Dot("focus", graph_type="digraph", bgcolor="transparent", ranksep="0.3")
    graph.set_node_defaults(
        shape="box", style="filled", fontname=_FONT, fontsize="12", height="0.3", margin="0.12,0.05"
    )
    graph.set_edge_defaults(arrowsize="0.6", color="#6b7684")
    clusters = {
        layer: pydot.Subgraph(
            f"cluster{layer}", label=f"layer {layer}", fontname=_FONT, color="#b6bfca"
        )
        for layer in modules.values()
    }
    for node in flow:
        if node in inside:
            continue
        layer = next((modules[path] for path in module_stack(node) if path in modules), None)
        owner = graph if layer is None else clusters[layer]
        css_class = (
            _class_after(node, analysis.plan)
            if after
            else _class_before(node, analysis.canonical.axes)
        )
        shape = _shape(node, None if after else analysis.canonical.axes)
        css_class += " entry" if node.name == analysis.plan.embedding else ""
        owner.add_node(_node(node, css_class, shape, node in returned))
    for cluster in clusters.values():
        if cluster.get_nodes():
            graph.add_subgraph(cluster)
    if inside:
        graph.add_node(_folded_box(len(inside), len(analysis.plan.sites) - 1))
    drawn_name = {node: _FOLDED if node in inside else node.name for node in flow}
    for source, target in dict.fromkeys(
        (drawn_name[tail], drawn_name[head]) for tail, head in flow.edges
    ):
        if source != target:
            graph.add_edge(pydot.Edge(source, target))
    return str(graph.to_string())


def _node(node: Node, css_class: str, shape: str, returned: bool) -> pydot.Node:
    import pydot

    name, target = node.name, node.target
    style: dict[str, Any] = {}
    if isinstance(target, OpOverload):
        space, _, name = str(target._schema.name).partition("::")
        if space == "focus":
            css_class += " focus"
            style |= {"penwidth": "2.5", "color": "#a3195b"}
        name = name if space == "aten" else f"{space}::{name}"
    tooltip = node.format_node() or node.name
    tooltip = tooltip if len(tooltip) <= _TOOLTIP else f"{tooltip[:_TOOLTIP]}…"
    style |= {
        "label": _quoted(f"{name}\n{shape}" if shape else name),
        "tooltip": _quoted("\n".join(filter(None, (tooltip, module_path(node))))),
        "class": _quoted(css_class),
        "fillcolor": _quoted(_FILLS[css_class.split(maxsplit=1)[0]]),
    }
    if node.op == "placeholder":
        style["shape"] = "ellipse"
    if returned:
        style["peripheries"] = "2"
    return pydot.Node(node.name, **style)


def _folded_box(count: int, last: int) -> pydot.Node:
    import pydot

    layers = "layer 3" if last == 3 else f"layers 3 to {last}"
    style: dict[str, Any] = {
        "label": _quoted(f"{layers}\n{count} nodes, folded"),
        "tooltip": _quoted(f"from attention in layer 2, excluded, to that in layer {last}"),
        "class": "folded",
        "fillcolor": _quoted(_FILLS["folded"]),
        "shape": "box3d",
        "margin": "0.3",
    }
    return pydot.Node(_FOLDED, **style)


def _quoted(text: str) -> str:
    """A DOT string of exactly this text: no markup, no entities, no escapes of its own."""
    for character, escape in (("\\", "\\\\"), ('"', '\\"'), ("&", "&amp;"), ("\n", "\\n")):
        text = text.replace(character, escape)
    return f'"{text}"'


def _class_before(node: Node, axes: AxisMap) -> str:
    if not isinstance(node.meta["val"], torch.Tensor):
        return "token"
    dims = [dim for dim in axes.of(node) if dim]
    past = (axis.role is None and is_generic(int(axis.size)) for dim in dims for axis in dim)
    if any(axes.history(dim) is not None for dim in dims) or any(past):
        return "history"
    return "token" if any(axes.holds(dim, role) for dim in dims for role in Role) else "other"


def _class_after(node: Node, plan: Plan) -> str:
    """Domain of a value: the plan's, or that of the rows that its shape counts."""
    if (place := plan.packed.get(node.name)) is not None:
        return place.domain.value
    value = node.meta["val"]
    shape = value.shape if isinstance(value, torch.Tensor) else ()
    names = {_extent(int(size)).removesuffix("_row") for size in shape}
    return next((domain.value for domain in Domain if domain.value in names), "canvas")


def _shape(node: Node, axes: AxisMap | None) -> str:
    value = node.meta["val"]
    if not isinstance(value, torch.Tensor):
        return ""
    if axes is not None:
        return labels(axes, node)
    return f"[{', '.join(_extent(int(size)) for size in value.shape)}]"


def _extent(size: int) -> str:
    """A size of a rewritten graph, in which the generic number of a name stands for the name."""
    if size in _NAMES or is_generic(size):
        return _NAMES.get(size, "history")
    if is_generic(past := size - GENERIC["token"]) and _extent(past) in ("history", "extra"):
        return f"{_extent(past)}+token"
    for number, name in _NAMES.items():
        if size and size % number == 0:
            return f"{name}*{_extent(size // number)}"
    return str(size)
