"""Cut the FOCUS graph in two: the prefix decides what is retained, the suffix computes it.

The prefix is layer 0, and layer 1 up to its q, k and v, with importance and selection. Between the
two the host reads how many tokens are retained, so that the suffix has ordinary symbolic sizes.
"""

from __future__ import annotations

from dataclasses import dataclass

import networkx as nx
import torch
from torch.fx import Graph, GraphModule, Node

from focus_compile.axes import graph_outputs
from focus_compile.passes.narrow import merged_name
from focus_compile.passes.retain import CONTROL
from focus_compile.sites import data_flow

__all__ = ["Half", "Halves", "cut"]


@dataclass(frozen=True)
class Half:
    """One of the two programs: its graph, and the names of its inputs and outputs, in order."""

    gm: GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Halves:
    """Prefix and suffix.

    ``own`` names the values that the model returns, in its order; ``kv`` those that hold each
    layer's keys and values, history first; ``control`` what the host reads.
    """

    prefix: Half
    suffix: Half
    own: tuple[str | None, ...]
    kv: tuple[tuple[str, str], ...]
    control: dict[str, str]


def cut(gm: GraphModule) -> Halves:
    """FOCUS graph -> prefix and suffix."""
    own, control, kv = graph_outputs(gm)
    flow = data_flow(gm)
    nodes = {node.name: node for node in gm.graph.nodes}
    ends: list[Node] = [*control, *kv[0]]
    ends += [nodes[merged_name(1, part)] for part in (0, 1)]
    early = set(ends)
    for end in ends:
        early |= nx.ancestors(flow, end)
    late_inputs = {nodes[name] for name in ("tokens", "rows")}
    for node in own:
        if isinstance(node, Node) and not (nx.ancestors(flow, node) & late_inputs):
            early |= {node} | nx.ancestors(flow, node)
    early = {node for node in early if _computes(node)}

    results = [node for node in (*own, *(v for pair in kv for v in pair)) if isinstance(node, Node)]
    late = set(results) - early
    for node in list(late):
        late |= nx.ancestors(flow, node)
    late = {node for node in late if _computes(node)} - early
    live = [
        node
        for node in gm.graph.nodes
        if node in early and any(user in late for user in node.users)
    ]
    first = _unique([*control, *live, *(node for node in results if node in early)])
    second = _unique([node for node in results if node in late])
    return Halves(
        prefix=_half(gm, early, first),
        suffix=_half(gm, late, second),
        own=tuple(node.name if isinstance(node, Node) else None for node in own),
        kv=tuple((key.name, value.name) for key, value in kv),
        control={name: node.name for name, node in zip(CONTROL, control, strict=True)},
    )


def _unique(nodes: list[Node]) -> list[Node]:
    return list(dict.fromkeys(nodes))


def _computes(node: Node) -> bool:
    """Whether a node computes tensors; sizes are computed anew in each half."""
    return node.op == "call_function" and not isinstance(node.meta["val"], int | torch.SymInt)


def _sizes_of(members: set[Node]) -> set[Node]:
    """Size computations that ``members`` read, and those that these read."""
    found: set[Node] = set()
    queue = list(members)
    while queue:
        for source in queue.pop().all_input_nodes:
            if isinstance(source.meta["val"], int | torch.SymInt) and source not in found:
                found.add(source)
                queue.append(source)
    return found


def _half(gm: GraphModule, members: set[Node], outputs: list[Node]) -> Half:
    """The sub-graph of ``members``; whatever they read from outside becomes an input."""
    graph = Graph()
    env: dict[Node, Node] = {}
    members = members | _sizes_of(members)
    reads = {source for node in members for source in node.all_input_nodes} - members
    inputs = [node for node in gm.graph.nodes if node in reads and node.op != "get_attr"]
    for node in inputs:
        env[node] = graph.create_node("placeholder", node.name, name=node.name)
        env[node].meta = dict(node.meta)
    for node in gm.graph.nodes:
        if node in members or (node.op == "get_attr" and node in reads):
            env[node] = graph.node_copy(node, lambda arg: env[arg])
    graph.output(tuple(env[node] for node in outputs))
    graph.lint()
    half = GraphModule(gm, graph)
    return Half(half, tuple(n.name for n in inputs), tuple(n.name for n in outputs))
