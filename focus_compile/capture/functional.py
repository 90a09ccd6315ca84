"""Operators that write into a value of the graph -> operators that return a new one.

Pre-dispatch graphs keep ``scatter_``, ``div_``, ``mul_``, ... as the model wrote them. Where only
the written value is read afterwards, and no other view of its memory, the operator without the
underscore computes the same. An input that is written as a whole (a cache of fixed length) gets its
last value after the call; what writes into a view of one is left alone, and refused.
"""

from __future__ import annotations

import operator
from typing import Any

import sympy
import torch
from torch.fx import Graph, GraphModule, Node

from focus_compile.graph.nodes import expr_of, operands, tensor_of
from focus_compile.torch_private import OpOverload

__all__ = ["aliased", "drop_whole_slices", "functionalize"]

aten = torch.ops.aten
KEPT = (aten.detach_.default,)
MAY_RETURN_OPERAND = (
    aten.dropout.default, aten.feature_dropout.default, aten.type_as.default,
    aten.atleast_1d.default, aten.atleast_2d.default, aten.atleast_3d.default,
)  # fmt: skip
"""Operators that may return their operand itself, though their schemas do not say so."""
CONVERSIONS = (
    aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.to.other, aten.type_as.default,
)  # fmt: skip
"""Operators that return their operand itself where it is already of the dtype and device."""
VIEWS = (
    aten.view.default, aten.transpose.int, aten.permute.default, aten.t.default,
    aten.slice.Tensor, aten.select.int, aten.unsqueeze.default, aten.squeeze.dim,
    aten.unflatten.int, aten.expand.default, aten.alias.default, aten.detach.default,
)  # fmt: skip
"""Operators whose result is their operand's memory, whatever its strides."""


def functionalize(gm: GraphModule) -> dict[Node, Node]:
    """Replace writes in place, where that is safe.

    Returns:
        inputs that the graph wrote into, with the value that each of them is to have.
    """
    graph = gm.graph
    drop_whole_slices(graph)
    inputs: dict[Node, Node] = {}
    for node in list(graph.nodes):
        counterpart = _counterpart(node)
        if counterpart is None:
            continue
        written = node.args[0]
        _take_views_anew(written, node, graph)
        order = {candidate: index for index, candidate in enumerate(graph.nodes)}
        if not _only_read_through(written, node, order, graph, set(inputs.values())):
            continue
        with graph.inserting_before(node):
            replacement = graph.call_function(counterpart, node.args, node.kwargs)
            replacement.meta = dict(node.meta)
            if _may_promote(node):  # what is written takes the dtype of where it goes
                replacement = graph.call_function(
                    aten.to.dtype, (replacement, tensor_of(written).dtype)
                )
                replacement.meta = dict(node.meta)
        node.replace_all_uses_with(replacement)
        for user in list(written.users):
            if user is not replacement and order.get(user, -1) > order[node]:
                user.replace_input_with(written, replacement)
        graph.erase_node(node)
        if written.op == "placeholder":
            inputs[written] = replacement
        for placeholder, value in inputs.items():
            if value is written:
                inputs[placeholder] = replacement
    gm.recompile()
    return inputs


def drop_whole_slices(graph: Graph) -> None:
    """``x[:]`` is ``x``: with it, an assignment to ``x[:, :, index]`` writes into ``x`` itself."""
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target is not aten.slice.Tensor:
            continue
        source = node.args[0]
        if isinstance(source, Node) and _shape(source) == _shape(node):
            node.replace_all_uses_with(source)
            graph.erase_node(node)


def _shape(node: Node) -> list[sympy.Expr]:
    return [expr_of(size) for size in tensor_of(node).shape]


def _kind(node: Node) -> tuple[torch.dtype, torch.device]:
    return tensor_of(node).dtype, tensor_of(node).device


def _counterpart(node: Node) -> OpOverload | None:
    """The operator that returns what ``node`` writes into its first argument."""
    target = node.target
    if not isinstance(target, OpOverload) or target in KEPT or not target._schema.is_mutable:
        return None
    name = target._schema.name.partition("::")[2]
    destination, *sources = target._schema.arguments
    if target.namespace != "aten" or not name.endswith("_") or not isinstance(node.args[0], Node):
        return None
    if not _writes(destination) or any(_writes(source) for source in sources):
        return None
    packet: Any = getattr(aten, name[:-1], None)
    overload: OpOverload | None = getattr(packet, target._overloadname, None)
    return overload


def _writes(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _may_promote(node: Node) -> bool:
    """Whether operands of another dtype, but of the same kind, could make the result another's."""
    written, *sources = (tensor_of(arg) for arg in operands(node))
    return any(
        source.dtype not in (written.dtype, torch.bool)
        and source.is_floating_point() == written.is_floating_point()
        for source in sources
    )


def _take_views_anew(written: Any, node: Node, graph: Graph) -> None:
    """Views of ``written`` that are read after ``node`` are taken after it: the same memory."""
    order = {candidate: index for index, candidate in enumerate(graph.nodes)}
    anew: dict[Node, Node] = {written: written}
    place = node
    for view in list(graph.nodes)[: order[node]]:
        if view.target not in VIEWS or view.args[0] not in anew:
            continue
        with graph.inserting_after(place):
            args = (anew[view.args[0]], *view.args[1:])
            place = anew[view] = graph.call_function(view.target, args, view.kwargs)
        place.meta = dict(view.meta)
        for user in list(view.users):
            if order.get(user, -1) > order[node]:
                user.replace_input_with(view, place)
    del anew[written]
    for view in reversed(anew.values()):
        if not view.users:
            graph.erase_node(view)


def _only_read_through(
    written: Any, node: Node, order: dict[Node, int], graph: Graph, inputs: set[Node]
) -> bool:
    """Whether, after ``node``, nobody reads the written memory but through ``written``.

    ``inputs``: values that inputs are to have; of these, too, only a whole one may be written.
    """
    base = written
    while (source := aliased(base)) is not None:
        base = source
    if base.op not in ("call_function", "placeholder"):
        return False
    if base is not written and (base.op == "placeholder" or base in inputs):
        return False
    aliases = {base}
    for earlier in graph.nodes:  # in order: an alias comes after what it is one of
        if earlier is node:
            break
        if aliased(earlier) in aliases:
            aliases.add(earlier)
    return not any(
        order[user] > order[node] for alias in aliases - {written} for user in alias.users
    )


def aliased(node: Node) -> Node | None:
    """The operand whose memory the result of ``node`` may share."""
    if node.op != "call_function" or not node.args:
        return None
    source = node.args[0]
    if node.target is operator.getitem:
        if isinstance(source, Node) and source.target is aten.broadcast_tensors.default:
            return source.args[0][node.args[1]]  # type: ignore[index, return-value]
        return aliased(source) if isinstance(source, Node) else None
    if not isinstance(node.target, OpOverload) or not isinstance(source, Node):
        return None
    if node.target in CONVERSIONS and _kind(node) != _kind(source):
        return None
    if node.target in MAY_RETURN_OPERAND:
        return source
    shared = any(result.alias_info is not None for result in node.target._schema.returns)
    return source if shared else None
