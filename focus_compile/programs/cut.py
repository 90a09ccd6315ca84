"""Cut the FOCUS graph in two: the prefix decides what is retained, the suffix computes it.

The prefix is all up to the q, k and v of the second scored layer, with importance and selection.
Between the two the host reads how many tokens are retained, so that the suffix has ordinary
symbolic sizes. After them stands what the ``restore`` pass put at the outputs: the host calls it,
unless the caller takes packed logits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import networkx as nx
import torch
from torch.fx import Graph, GraphModule, Node

from focus_compile.errors import Unsupported
from focus_compile.graph.nodes import data_flow, graph_outputs, tensor_of
from focus_compile.ops.library import focus
from focus_compile.plan.controls import Selection
from focus_compile.plan.plan import Domain, Plan
from focus_compile.programs.halves import Half, Halves, Returned
from focus_compile.refusals import RETURNS_LAST

__all__ = ["cut", "part"]


def cut(gm: GraphModule, plan: Plan, last: Mapping[int, int] | None = None) -> Halves:
    """FOCUS graph -> prefix and suffix; ``last``: outputs, by position, that are shortened."""
    own, selection, kv = graph_outputs(gm)
    last = last or {}
    flow = data_flow(gm)
    returned = [
        _returned(node, last.get(index), plan) if isinstance(node, Node) else None
        for index, node in enumerate(own)
    ]
    tails = [
        None if value is None or value.domain is not None else _tail(node, gm, kv, flow)
        for node, value in zip(own, returned, strict=True)
    ]
    nodes = {node.name: node for node in gm.graph.nodes}
    early_layers = kv[: plan.scored[1] + 1]
    ends: list[Node] = [*selection, *(node for pair in early_layers for node in pair)]
    early = set(ends)
    for end in ends:
        early |= nx.ancestors(flow, end)
    late_inputs = {nodes[table.name] for table in vars(plan.tables).values()}
    results = [nodes[value.name] for value in returned if value is not None]
    for node in results:
        if not (nx.ancestors(flow, node) & late_inputs):
            early |= {node} | nx.ancestors(flow, node)
    early = {node for node in early if _computes(node)}

    results += [node for pair in kv for node in pair]
    late = set(results) - early
    for node in list(late):
        late |= nx.ancestors(flow, node)
    late = {node for node in late if _computes(node)} - early
    live = [
        node
        for node in gm.graph.nodes
        if node in early and any(user in late for user in node.users)
    ]
    first = _unique([*selection, *live, *(node for node in results if node in early)])
    second = _unique([node for node in results if node in late])
    return Halves(
        prefix=_half(gm, early, first),
        suffix=_half(gm, late, second, plan.scored_sites[1].writes[0].past),
        own=tuple(returned),
        tails=tuple(tails),
        logits=_last(returned, gm),
        vocabulary=_vocabulary(returned, gm, plan),
        slots={
            slot.name: node.name
            for given, made in zip(plan.slots, kv, strict=True)
            for slot, node in zip(given, made, strict=True)
        },
        selection=Selection(*(node.name for node in selection)),
    )


def part(gm: GraphModule, node: Node) -> Half:
    """What computes one value of a graph."""
    members = {found for found in {node} | nx.ancestors(data_flow(gm), node) if _computes(found)}
    return _half(gm, members, [node])


def _tail(
    node: Node, gm: GraphModule, kv: Sequence[tuple[Node, Node]], flow: nx.DiGraph
) -> Half | None:
    """What makes a value of the last layer's values, if something does: a copy, or a cache."""
    stored = {node for pair in kv for node in pair}
    members: set[Node] = set()
    queue = [node]
    while queue:
        found = queue.pop()
        if found not in members and found not in stored and _computes(found):
            members.add(found)
            queue += flow.predecessors(found)
    reads = {source for member in members for source in member.all_input_nodes} | {node}
    return _half(gm, members, [node]) if kv[-1][1] in reads else None


def _returned(node: Node, last: int | None, plan: Plan) -> Returned:
    if node.target is not focus.restore.default:
        if last is not None:
            raise Unsupported(RETURNS_LAST, node)
        return Returned(node.name)
    value, _, _, batch_dim, token_dim = node.args
    assert isinstance(value, Node)
    domain = plan.packed[value.name].domain
    return Returned(value.name, domain, batch_dim, token_dim, last)  # type: ignore[arg-type]


def _last(returned: list[Returned | None], gm: GraphModule) -> Returned | None:
    """The packed value that is computed last: the logits, wherever the model returns them."""
    order = {node.name: index for index, node in enumerate(gm.graph.nodes)}
    packed = [value for value in returned if value is not None and value.domain is not None]
    return max(packed, key=lambda value: order[value.name], default=None)


def _vocabulary(returned: list[Returned | None], gm: GraphModule, plan: Plan) -> tuple[int, ...]:
    """Packed values of retained tokens, ``[.., N, V]``, as wide as the embedding has rows.

    Where hidden states are as wide, nothing tells them apart.
    """
    nodes = {node.name: node for node in gm.graph.nodes}
    embedding = nodes[plan.embedding]
    weight = embedding.args[0]
    assert isinstance(weight, Node)
    rows, ranks = tensor_of(weight).shape[0], 1 if plan.heads is None else plan.heads.ranks
    found = []
    for index, value in enumerate(returned):
        if value is None or value.domain is not Domain.RETAINED:
            continue
        shape = tensor_of(nodes[value.name]).shape
        wide = rows * (ranks - 1) < shape[-1] <= rows * ranks
        if wide and shape[-1] != tensor_of(embedding).shape[-1]:
            if value.token_dim == len(shape) - 2:
                found.append(index)
    return tuple(found)


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


def _half(
    gm: GraphModule, members: set[Node], outputs: list[Node], history: str | None = None
) -> Half:
    """The sub-graph of ``members``; whatever they read from outside becomes an input.

    ``history``: an input that is one in any case. It tells the compiler the length of the history,
    of which the keys that come from the other half hold only the sum with that of the block.
    """
    graph = Graph()
    env: dict[Node, Node] = {}
    members = members | _sizes_of(members)
    reads = {source for node in members for source in node.all_input_nodes} | set(outputs)
    reads -= members
    inputs = [
        node
        for node in gm.graph.nodes
        if (node in reads and node.op != "get_attr") or node.name == history
    ]
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
