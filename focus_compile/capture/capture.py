"""Dynamo's graph -> pre-dispatch ATen under the same fake mode, sizes kept symbolic.

Writes in place become pure operators where nobody else can see them, and what is written into an
input becomes an output.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import GraphModule
from torch.fx.traceback import preserve_node_meta

from focus_compile.capture.functional import functionalize
from focus_compile.capture.held import hold
from focus_compile.capture.local_rank import LocalRank, local_value, shard_of
from focus_compile.capture.parts import split_inputs
from focus_compile.capture.plain import say_plainly
from focus_compile.capture.puts import name_puts
from focus_compile.errors import Unsupported
from focus_compile.graph.inputs import Argument
from focus_compile.graph.nodes import graph_inputs, graph_outputs
from focus_compile.refusals import (
    FLEX_ATTENTION,
    NO_TENSOR_INPUT,
    OPERATOR_WITH_A_GRAPH,
)
from focus_compile.torch_private import (
    FakeTensor,
    HigherOrderOperator,
    is_module_state,
    make_fx,
)

__all__ = ["Captured", "capture", "has_attention"]


@dataclass(frozen=True)
class Captured:
    """Dynamo's graph as pre-dispatch ATen; inputs are given by position.

    ``written``: those that the model writes into; their new values are its last outputs. ``held``:
    those that hold history and block, and along which dim; to the graph they are the history.
    ``arguments``: what each input is among the arguments of Dynamo's graph.
    """

    gm: GraphModule
    written: tuple[int, ...]
    held: dict[int, int]
    arguments: tuple[Argument, ...]


def has_attention(gm: GraphModule) -> bool:
    """Whether Dynamo's graph calls attention or a softmax: samplers and mask builders do not."""
    names = ("scaled_dot_product_attention", "softmax", "flex_attention", "_softmax")
    return any(
        node.op in ("call_function", "call_method")
        and (node.target if isinstance(node.target, str) else node.target.__name__) in names
        for node in gm.graph.nodes
    )


def capture(gm: GraphModule) -> Captured:
    """Trace Dynamo's graph to pre-dispatch ATen; module paths and input provenance are kept.

    Inputs that are made of other tensors (:mod:`~.unwrap`) are no values of it.

    Raises:
        Unsupported: the graph has no tensor input, or an operator that holds a graph of its own.
    """
    values = [node.meta["example_value"] for node in graph_inputs(gm)]
    for node in gm.graph.nodes:
        if isinstance(node.target, HigherOrderOperator):
            if str(node.target).startswith("flex_attention"):
                raise Unsupported(FLEX_ATTENTION, node)
            raise Unsupported(OPERATOR_WITH_A_GRAPH, node)
    local_values = [local_value(value) for value in values]
    modes = [value.fake_mode for value in local_values if isinstance(value, FakeTensor)]
    if not modes:
        raise Unsupported(NO_TENSOR_INPUT)
    with modes[0], preserve_node_meta():
        graph = make_fx(LocalRank(gm, values).run, pre_dispatch=True)(*local_values)
    for node, traced in zip(graph_inputs(gm), graph_inputs(graph), strict=True):
        if "tensor_dict" in node.meta:
            traced.meta["tensor_dict"] = node.meta["tensor_dict"]
        traced.meta.setdefault("val", None)  # of a mesh, or what is made of tensors
        traced.meta["shard"] = shard_of(node.meta["example_value"])
    graph.graph.eliminate_dead_code()
    own = {
        at
        for at, node in enumerate(graph_inputs(gm))
        if is_module_state(node) or "part" in node.meta
    }
    arguments = split_inputs(graph, own)
    say_plainly(graph)
    held = hold(graph)
    name_puts(graph)
    written = functionalize(graph)
    if written:
        graph.graph.output_node().args = ((*graph_outputs(graph), *written.values()),)
    graph.recompile()
    positions = {node: index for index, node in enumerate(graph_inputs(graph))}
    return Captured(
        graph,
        tuple(positions[node] for node in written),
        {positions[node]: dim for node, dim in held.items()},
        arguments,
    )
