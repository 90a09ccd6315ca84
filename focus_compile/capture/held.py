"""Caches that hold room for the block -> caches that grow: one form for all passes.

past[:, :, S:] = k           ->   cat([past, k])      past [B, G, S + T, D] becomes [B, G, S, D]
attention(q, past, ...)           attention(q, cat, ...)

Nothing grows, and nothing is copied where such a graph runs: keys and values of the block are
written behind the history, where they stay (``focus::store``).
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import sympy
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from focus_compile.capture.functional import aliased, drop_whole_slices
from focus_compile.graph.nodes import argument, aten, expr_of, graph_inputs, tensor_of, wrap
from focus_compile.torch_private import OpOverload

__all__ = ["hold"]


def hold(gm: GraphModule) -> dict[Node, int]:
    """Bring writes into the last slots of an input into the form that grows, in place.

    Returns:
        inputs that hold history and block, and their dim that does; their values are the history
        alone from now on. Whatever else is written into an input stays as it is.
    """
    drop_whole_slices(gm.graph)
    _drop_known_sizes(gm)
    held: dict[Node, int] = {}
    order = {node: at for at, node in enumerate(gm.graph.nodes)}
    written = Counter(_base(node.args[0]) for node in gm.graph.nodes if _mutates(node))
    for past in graph_inputs(gm):
        users = sorted(past.users, key=order.__getitem__)
        if users and (write := _write(users[0], past)) is not None:
            slots, dim = users[0], write.args[0].args[1]  # type: ignore[union-attr]
            if written[past] == 1 and all(order[user] > order[write] for user in users[1:]):
                held[past] = wrap(dim, tensor_of(past).dim())  # type: ignore[arg-type]
                order[_join(gm, past, slots, write, held[past])] = order[write]
    gm.recompile()
    return held


def _drop_known_sizes(gm: GraphModule) -> None:
    """Sizes that are numbers, as where history and block are as long as a head is wide."""
    for node in list(gm.graph.nodes):
        if node.target is aten.sym_size.int and expr_of(node.meta["val"]).is_Integer:
            size = int(expr_of(node.meta["val"]))
            for user in list(node.users):
                args = (user.args, user.kwargs)
                user.args, user.kwargs = map_arg(args, lambda arg: size if arg is node else arg)  # noqa: B023
            gm.graph.erase_node(node)


def _mutates(node: Node) -> bool:
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable


def _base(node: Any) -> Any:
    """Whose memory a value is a part of."""
    while isinstance(node, Node) and (source := aliased(node)) is not None:
        node = source
    return node


def _write(slots: Node, past: Node) -> Node | None:
    """The node that writes into ``slots``, if these are the last ones of ``past``, as a whole."""
    if slots.target is not aten.slice.Tensor or argument(slots, 4, "step", 1) != 1:
        return None
    if len(slots.users) != 1:
        return None
    (write,) = slots.users
    if write.target is not aten.copy_.default or write.args[0] is not slots or write.users:
        return None
    new = write.args[1]
    if not isinstance(new, Node) or _facts(new) != _facts(slots):
        return None
    dim = wrap(argument(slots, 1, "dim", 0), tensor_of(past).dim())
    whole, block = (expr_of(tensor_of(node).shape[dim]) for node in (past, slots))
    start: Any = argument(slots, 2, "start", 0)
    begins = expr_of(start.meta["val"] if isinstance(start, Node) else start or 0)
    return write if begins in (whole - block, -block) else None


def _facts(node: Node) -> tuple[list[sympy.Expr], Any]:
    value = tensor_of(node)
    return [expr_of(size) for size in value.shape], value.dtype


def _join(gm: GraphModule, past: Node, slots: Node, write: Node, dim: int) -> Node:
    new: Any = write.args[1]
    value, block = tensor_of(past), tensor_of(new)
    history = value.shape[dim] - block.shape[dim]
    with value.fake_mode:  # type: ignore[attr-defined]
        past.meta["val"] = value.narrow(dim, 0, history)
    with gm.graph.inserting_before(write):
        joined = gm.graph.call_function(aten.cat.default, ([past, new], dim))
    joined.meta = dict(write.meta)
    joined.meta["val"] = value
    for user in list(past.users):
        if user not in (slots, joined):
            user.replace_input_with(past, joined)
    gm.graph.erase_node(write)
    gm.graph.erase_node(slots)
    return joined
