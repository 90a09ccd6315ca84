"""Which nodes of a graph a picture holds, which edges, and which layers are one box."""

from __future__ import annotations

import operator
from collections.abc import Iterator

import networkx as nx
import torch
from torch.fx import GraphModule, Node

from focus_compile.plan.plan import Plan
from focus_compile.plan.sites import Site

__all__ = ["flow_of", "folded", "layer_modules", "module_stack", "origins"]


def flow_of(gm: GraphModule, weights: set[str]) -> nx.DiGraph:
    """What is drawn, with edges along which values pass, also through ``getitem``."""
    flow: nx.DiGraph = nx.DiGraph()
    flow.add_nodes_from(node for node in gm.graph.nodes if _drawn(node, weights))
    flow.add_edges_from((source, node) for node in list(flow) for source in origins(node, flow))
    returned = set(origins(gm.graph.output_node(), flow))
    idle = [node for node in flow if node.op == "placeholder" and not flow.out_degree(node)]
    flow.remove_nodes_from(set(idle) - returned)  # only their sizes are read
    return flow


def _drawn(node: Node, weights: set[str]) -> bool:
    if node.op == "placeholder":
        return node.name not in weights
    tensors = node.op == "call_function" and isinstance(
        node.meta["val"], torch.Tensor | tuple | list
    )
    return tensors and node.target is not operator.getitem


def origins(node: Node, flow: nx.DiGraph) -> Iterator[Node]:
    for source in node.all_input_nodes:
        if source in flow:
            yield source
        elif source.target is operator.getitem:
            yield from origins(source, flow)


def folded(gm: GraphModule, flow: nx.DiGraph, plan: Plan) -> set[Node]:
    """What stands after the first site of retained tokens, up to the last; inputs of it alone.

    It stands together in a topological order, so that no path leaves the box and comes back.
    """
    late = plan.sites[plan.scored[1] + 1 :]
    if len(late) < 2:
        return set()
    order = [node.name for node in gm.graph.nodes]
    first, last = order.index(late[0].out), order.index(late[-1].out)
    names = set(order[first + 1 : last + 1])
    inside = {node for node in flow if node.name in names}
    alone = (node for node in flow if node.op == "placeholder" and flow.out_degree(node))
    return inside | {node for node in alone if inside.issuperset(flow.successors(node))}


def layer_modules(gm: GraphModule, sites: tuple[Site, ...]) -> dict[str, int]:
    """Layer by the path of its module: where the modules around the sites begin to differ."""
    nodes = {node.name: node for node in gm.graph.nodes}
    stacks = [module_stack(nodes[site.out]) for site in sites]
    for paths in zip(*stacks, strict=False):
        if len(set(paths)) == len(paths):
            return {path: layer for layer, path in enumerate(paths)}
    return {}


def module_stack(node: Node) -> list[str]:
    """Paths of the modules that a node was called in, outermost first."""
    return [str(path) for path, _ in node.meta.get("nn_module_stack", {}).values()]
