"""Models that return logits of their last tokens only: ``lm_head(hidden[:, -k:])``.

Which of the last ``k`` tokens are computed is not known before they are selected. So the slice is
moved behind the model: the graph computes rows of all retained tokens, and what it returns is cut
when it is back on the canvas.
"""

from __future__ import annotations

import sys

import networkx as nx
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from focus_compile.axes.axes import AxisMap, Role
from focus_compile.axes.propagate import Labelled, label
from focus_compile.axes.rules.table import RESHAPES
from focus_compile.errors import Unsupported
from focus_compile.graph.nodes import (
    argument,
    aten,
    data_flow,
    fake_mode_of,
    graph_outputs,
    operands,
    tensor_of,
)
from focus_compile.graph.replay import Replay
from focus_compile.refusals import LAST_TOKENS, MIXES_TOKENS

__all__ = ["widen"]


def widen(captured: Labelled) -> tuple[Labelled, dict[int, int]]:
    """Drop slices that keep the last tokens.

    Returns:
        the graph, and for outputs that were shortened, by position, the number of last tokens.

    Raises:
        Unsupported: what is computed from the last tokens has a form that is not understood.
    """
    gm, axes = captured.gm, captured.axes
    slices = _last_tokens(gm, axes)
    if not slices:
        return captured, {}
    replay = Replay(gm, fake_mode_of(gm))
    env: dict[Node, Node] = {}
    shortened: dict[Node, int] = {}
    for node in gm.graph.nodes:
        if node.op == "output":
            continue
        lengths = {shortened[source] for source in node.all_input_nodes if source in shortened}
        if node in slices:
            env[node] = env[node.args[0]]
            shortened[node] = slices[node]  # 0: all of them, written as `[-0:]`
        elif lengths:
            full = [source for source in operands(node) if source not in shortened]
            if any(axes.holds(dim, Role.TOKEN) for source in full for dim in axes.of(source)):
                raise Unsupported(MIXES_TOKENS, node)
            if len(lengths) > 1:
                raise Unsupported(LAST_TOKENS, node)
            env[node] = _widened(node, replay, env, any(lengths))
            (shortened[node],) = lengths
        else:
            env[node] = replay.graph.node_copy(node, lambda arg: env[arg])
            if node.op == "get_attr":
                replay.attributes[str(node.target)] = getattr(gm, str(node.target))
    outputs = graph_outputs(gm)
    last = {index: shortened[out] for index, out in enumerate(outputs) if shortened.get(out)}
    return label(replay.finish(map_arg(outputs, lambda node: env[node]))), last


def _last_tokens(gm: GraphModule, axes: AxisMap) -> dict[Node, int]:
    """Slices of hidden states that keep the last tokens, and how many."""
    if axes.entry is None:
        return {}
    slices: dict[Node, int] = {}
    computed = nx.descendants(data_flow(gm), axes.entry.embedding)
    for node in computed:
        if node.target is not aten.slice.Tensor or not isinstance(node.args[0], Node):
            continue
        source, end = node.args[0], argument(node, 3, "end")
        at = argument(node, 1, "dim", 0) % tensor_of(source).dim()
        if source not in computed or axes.position(axes.of(source), Role.TOKEN) != at:
            continue
        shorter = axes.position(axes.of(node), Role.TOKEN) != at
        if shorter and end in (None, sys.maxsize) and (start := _slice_start(node)) <= 0:
            slices[node] = -start
    return slices


def _slice_start(node: Node) -> int:
    """Where a slice starts; a number among the model's arguments becomes a constant of the graph.

    Dynamo takes up the guard that makes it one.
    """
    start = argument(node, 2, "start") or 0
    return int(start.meta["val"] if isinstance(start, Node) else start)


def _widened(node: Node, replay: Replay, env: dict[Node, Node], longer: bool) -> Node:
    """A node whose operands may have become longer."""
    if longer and (node.target in RESHAPES or node.target is aten.expand.default):
        raise Unsupported(LAST_TOKENS, node)
    args, kwargs = map_arg((node.args, node.kwargs), lambda arg: env[arg])
    replayed = replay.call(node.target, args, kwargs, like=node)
    if isinstance(node.meta["val"], Tensor) and tensor_of(replayed).dim() != tensor_of(node).dim():
        raise Unsupported(LAST_TOKENS, node)  # a squeeze of one token, which is no longer one
    return replayed
