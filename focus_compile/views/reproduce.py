"""A refused graph as a script of its own: no model, no weights, the same refusal.

It holds the graph from its inputs to the operator at fault, one line per node: some ten lines for
each layer in front of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from focus_compile.analysis import analyze
from focus_compile.errors import EmptyCall, Unsupported
from focus_compile.graph.nodes import graph_inputs
from focus_compile.torch_private import import_block, is_made_of_tensors

__all__ = ["script", "smallest"]

_TEXT = '''"""FOCUS refuses this graph: {reason}

What to do: {cure}

Here are {kept} of its {whole} nodes, those that lead to it. Run it to see: python {name}
"""

import torch
{imports}


class Model(torch.nn.Module):
{forward}


inputs = [
{inputs}
]
compiled = torch.compile(Model(), backend="focus", options={{"strict": True}})
with torch.no_grad():
    compiled(*inputs)
'''


def script(gm: GraphModule, refusal: Unsupported, name: str) -> str | None:
    """Python that compiles the smallest part of a Dynamo graph that is refused alike.

    Inputs are zeros of the shapes and dtypes of the call's; sizes are numbers.

    Args:
        gm: Dynamo's graph; refusal: why it was refused; name: of the file.

    Returns:
        None where the graph holds others, or tensors of its own, which text cannot carry, or reads
        tensors made of others, and where the graph alone does not tell why it is refused, but the
        break at its end.
    """
    if any(node.op in ("get_attr", "call_module") for node in gm.graph.nodes):
        return None
    if any(is_made_of_tensors(node.meta["example_value"]) for node in graph_inputs(gm)):
        return None
    original, gm = gm, smallest(gm, refusal.reason)
    if _reason(gm) != refusal.reason:
        return None
    python = gm.graph.python_code("self")
    lines = [_input(node.meta["example_value"]) for node in graph_inputs(gm)]
    return _TEXT.format(
        reason=str(refusal).replace("\\", "/").replace('"""', "'''"),
        cure=refusal.cure,
        kept=len(gm.graph.nodes),
        whole=len(original.graph.nodes),
        name=name,
        imports=import_block(python.globals),
        forward="\n".join(f"    {line}".rstrip() for line in python.src.strip().splitlines()),
        inputs="\n".join(f"    {line}," for line in lines),
    )


def smallest(gm: GraphModule, reason: str) -> GraphModule:
    """The first nodes of a Dynamo graph, as few as are refused for this reason.

    Found by halving: a graph with more nodes need not be refused for the reason of one with less,
    so that it may not be the very smallest one, but the reason is the same.
    """
    calls = [node for node in gm.graph.nodes if node.op not in ("placeholder", "output")]
    best, low, high = gm, 0, len(calls) - 1
    while low < high:
        middle = (low + high) // 2
        candidate = _up_to(gm, calls[middle])
        if _reason(candidate) == reason:
            best, high = candidate, middle
        else:
            low = middle + 1
    return best


def _up_to(gm: GraphModule, last: Node) -> GraphModule:
    graph, env = Graph(), dict[Node, Node]()
    for node in gm.graph.nodes:
        env[node] = graph.node_copy(node, lambda arg: env[arg])
        if node is last:
            break
    graph.output((env[last],))
    graph.eliminate_dead_code()
    for node in list(graph.nodes):
        if node.op == "placeholder" and not node.users:
            graph.erase_node(node)
    return GraphModule(gm, graph)


def _reason(gm: GraphModule) -> str | None:
    try:
        analyze(gm)
    except Unsupported as refusal:
        return refusal.reason
    except EmptyCall:
        return None
    return None


def _input(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return repr(int(value))
    shape = tuple(int(size) for size in value.shape)
    return f"torch.zeros({shape}, dtype={value.dtype})"
