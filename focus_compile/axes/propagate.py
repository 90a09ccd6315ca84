"""Axis labels of a whole graph: rules applied node by node, starting at the token ids."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from focus_compile.axes.axes import AxisMap, Entry, Role
from focus_compile.axes.embedding import find_entry
from focus_compile.axes.rules.experts import meaning_of
from focus_compile.axes.rules.table import fresh, rule_of

__all__ = ["Labelled", "label", "propagate"]


@dataclass(frozen=True)
class Labelled:
    """A graph and what its axes are."""

    gm: GraphModule
    axes: AxisMap


def label(gm: GraphModule, entry: Entry | None = None) -> Labelled:
    """As :func:`propagate`, with the graph."""
    return Labelled(gm, propagate(gm, entry))


def _note(node: Node, axes: AxisMap) -> None:
    """Note what the values of a node mean, if anything follows from its operands."""
    if (
        isinstance(node.meta["val"], torch.Tensor)
        and (meaning := meaning_of(node, axes)) is not None
    ):
        axes.meaning[node] = meaning


def propagate(gm: GraphModule, entry: Entry | None = None) -> AxisMap:
    """Label the axes of every value of an ATen graph; labels start at the token ids.

    ``entry``: where these enter, if that is known.

    Raises:
        Unsupported: axes that stand for different things meet.
    """
    axes = AxisMap(entry or find_entry(gm))
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        axes.current = node
        if node.op in ("placeholder", "get_attr") and isinstance(value, torch.Tensor):
            axes.dims[node] = fresh(node, axes)
            if axes.entry is not None and node is axes.entry.ids:
                dims = axes.dims[node][0]
                axes.label(dims[-1], Role.TOKEN)
                for dim in dims[:-1]:
                    axes.label(dim, Role.BATCH)
        elif node.op == "call_function" and node.target.__name__ == "getitem":
            source, index = node.args
            if source in axes.dims and isinstance(value, torch.Tensor):
                axes.dims[node] = (axes.dims[source][index],)
                axes.mixed[node] = ()
                _note(node, axes)
        elif node.op == "call_function" and isinstance(value, torch.Tensor | list | tuple):
            rule = rule_of(node)
            if rule is None:
                axes.unruled.add(node)
                axes.dims[node] = fresh(node, axes)
            else:
                transfer = rule(node, axes)
                axes.dims[node], axes.mixed[node] = transfer.out, transfer.mixed
                _note(node, axes)
    axes.check()
    return axes
