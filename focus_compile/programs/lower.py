"""What Inductor gets in place of operators that it lowers badly, or does not see into."""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.nn import Parameter

from focus_compile.graph.nodes import operands, tensor_of
from focus_compile.ops.library import focus
from focus_compile.torch_private import OpOverload

__all__ = ["drop_unread", "lower", "stay"]

_ALIGNED = 8
_OF_TABLES = (torch.ops.aten.index_select.default, torch.ops.aten.to.dtype)
"""What stands between a table by position and the rows that are taken of it."""
_MATRIX = 2
_JOIN = [argument.name for argument in focus.join.default._schema.arguments]


def lower(gm: GraphModule, *, captured: bool = False) -> GraphModule:
    """A copy of prefix or suffix with operators made for its device.

    CPU, fp32: ``linear`` -> ``focus::linear``. Inductor calls a matrix product that was tuned for
    many rows; ``focus::linear`` says why and by how much that is slower for the retained tokens.

    CUDA: ``focus::importance`` -> ``focus_fused::importance``; ``focus::signal``, ``retain`` and
    ``tables`` -> ``focus_fused::choose``, whose Triton kernels become part of the output code.
    ``focus::join`` and ``focus::attend`` keep their names, and get an implementation of their own
    (:mod:`focus_compile.ops.triton.layers`); ``focus::store`` -> ``focus_fused::store``, which says
    that it writes, as ``focus::store_`` does elsewhere. ``focus::pack`` of rows of a table by
    position becomes what the compiler fuses into whoever reads them. Masks get rows of a multiple
    of 8, once for all layers: else ATen makes such a copy in each attention.

    ``captured``: the graph is to be recorded as a CUDA graph, in which ``focus::join`` cannot ask
    the host whether it may write into its slots: it never does.
    """
    graph = copy.deepcopy(gm.graph)
    for node in list(graph.nodes):
        if node.target is torch.ops.aten.linear.default and _fits(node):
            node.target = focus.linear.default
            node.args = (*node.args, None)[:3]
        elif node.target is focus.importance.default and _on_gpu(node):
            node.target = _fused().importance.default
        elif node.target is focus.retain.default and _on_gpu(node):
            _choose(graph, node)
        elif node.target is focus.pack.default and _on_gpu(node) and _is_of_a_table(node):
            _pick(graph, node)
        elif node.target is focus.site_mask.default and _on_gpu(node):
            _align(graph, node)
        elif node.target is focus.store.default:
            _store(graph, node)
        elif node.target is focus.join.default and captured:
            node.update_arg(_JOIN.index("reuse"), None)
    return GraphModule(gm, graph)


def drop_unread(gm: GraphModule, before: GraphModule) -> list[int]:
    """Take inputs away that are read in ``before`` and no longer; which are left, by position."""
    left = []
    pairs = zip(*(x.graph.find_nodes(op="placeholder") for x in (gm, before)), strict=True)
    for index, (node, old) in enumerate(pairs):
        if old.users and not node.users:
            gm.graph.erase_node(node)
        else:
            left.append(index)
    gm.recompile()
    return left


def stay(gm: GraphModule, inputs: Sequence[Any]) -> list[int]:
    """Inputs, by position, that lie in one place from call to call: weights, slots of a cache."""
    written = {node.args[0] for node in gm.graph.nodes if _says_that_it_stores(node)}
    return [
        index
        for index, node in enumerate(gm.graph.find_nodes(op="placeholder"))
        if isinstance(inputs[index], Parameter) or node in written
    ]


def _says_that_it_stores(node: Node) -> bool:
    target = node.target
    return isinstance(target, OpOverload) and target._schema.name == "focus_fused::store"


def _fits(node: Node) -> bool:
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    operands = [tensor_of(arg) for arg in node.args if isinstance(arg, Node)]
    alike = all(value.device.type == "cpu" and value.dtype == torch.float32 for value in operands)
    return alike and operands[1].dim() == _MATRIX and not node.kwargs


def _on_gpu(node: Node) -> bool:
    return tensor_of(node).device.type == "cuda"


def _fused() -> Any:
    """The fused operators, and what layers call; both need Triton, as every CUDA build has it."""
    import focus_compile.ops.triton.layers
    import focus_compile.ops.triton.operators  # noqa: F401

    return torch.ops.focus_fused


def _is_of_a_table(pack: Node) -> bool:
    """Whether rows of an input are packed, the same for the whole batch: cast at most."""
    value, _, _, batch_dim, _ = pack.args
    assert isinstance(value, Node)
    while value.target in _OF_TABLES:
        value = operands(value)[0]
    return batch_dim is None and value.op == "placeholder"


def _pick(graph: Graph, pack: Node) -> None:
    """A ``pack`` as :func:`focus_compile.ops.packing.pack` says, for the compiler to see into."""
    value, tokens, inverse, _, token_dim = pack.args
    with graph.inserting_before(pack):
        length = graph.call_function(torch.ops.aten.sym_size.int, (inverse, 1))
        place = graph.call_function(torch.ops.aten.remainder.Scalar, (tokens, length))
        args = (value, token_dim, place)
        made = graph.call_function(torch.ops.aten.index_select.default, args)
    pack.replace_all_uses_with(made)
    graph.erase_node(pack)


def _align(graph: Graph, mask: Node) -> None:
    """Columns that nobody reads, up to a multiple of 8, behind those of a mask."""
    readers = [user for user in mask.users if user.target is focus.attend.default]
    with graph.inserting_before(mask.next):
        length = graph.call_function(torch.ops.aten.sym_size.int, (mask, 3))
        whole = graph.call_function(operator.add, (length, _ALIGNED - 1))
        over = graph.call_function(operator.mod, (whole, _ALIGNED))
        more = graph.call_function(operator.sub, (_ALIGNED - 1, over))
        made = graph.call_function(torch.ops.aten.constant_pad_nd.default, (mask, [0, more]))
    for user in readers:
        user.replace_input_with(mask, made)


def _store(graph: Graph, store: Node) -> None:
    """The operator that says what it writes to: compilers take no other one's word for it."""
    slots = store.args[0]
    assert isinstance(slots, Node)
    with graph.inserting_before(store):
        declared = _fused().store.default if _on_gpu(store) else focus.store_.default
        graph.call_function(declared, store.args)
    store.replace_all_uses_with(slots)
    graph.erase_node(store)


def _choose(graph: Graph, retain: Node) -> None:
    """``signal``, ``retain`` and ``tables``, as the ``retain`` pass wrote them, become one node."""
    signal = retain.args[0]
    (tables,) = (user for user in retain.users if user.target is focus.tables.default)
    assert isinstance(signal, Node) and signal.target is focus.signal.default
    with graph.inserting_before(retain):
        chosen = graph.call_function(_fused().choose.default, (*signal.args, *retain.args[1:]))
        delta, mask = (graph.call_function(operator.getitem, (chosen, n)) for n in range(2))
    for part in list(tables.users):
        part.args = (chosen, part.args[1] + 2)  # type: ignore[operator]
    retain.replace_all_uses_with(mask)
    signal.replace_all_uses_with(delta)
    for node in (tables, retain, signal):
        graph.erase_node(node)
