"""Inputs that a model takes apart -> their parts as inputs: one tensor may hold all layers' caches.

cache[layer, 0]  ->  a graph input of its own, which the runtime takes from the argument
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from focus_compile.graph.inputs import Argument, Part
from focus_compile.graph.nodes import argument, aten, graph_inputs, tensor_of, wrap

__all__ = ["split_inputs"]


def split_inputs(gm: GraphModule, own: Collection[int]) -> tuple[Argument, ...]:
    """Give every part of an input that is only read part by part, by numbers, a placeholder.

    ``own``: inputs, by position, that are the model's; they stay whole.

    Returns:
        what every placeholder is.
    """
    found: list[Argument] = []
    queue: list[tuple[Node, int, Part]] = [(n, at, ()) for at, n in enumerate(graph_inputs(gm))]
    while queue:
        node, at, part = queue.pop(0)
        taken = {} if at in own else _taken(node)
        if not taken:
            found.append(Argument(at, part))
            continue
        parts: dict[tuple[int, int], Node] = {}
        for user, place in taken.items():
            if place not in parts:
                with gm.graph.inserting_before(node):
                    parts[place] = gm.graph.placeholder(user.name)
                parts[place].meta = dict(node.meta) | {"val": user.meta["val"]}
            user.replace_all_uses_with(parts[place])
            gm.graph.erase_node(user)
        for user in list(node.users):
            gm.graph.erase_node(user)  # unbind
        gm.graph.erase_node(node)
        queue = [(made, at, (*part, place)) for place, made in parts.items()] + queue
    gm.recompile()
    return tuple(found)


def _taken(node: Node) -> dict[Node, tuple[int, int]]:
    """Users that take one element of a dim each, with dim and element; {} if there are others."""
    value: Any = node.meta["val"]
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return {}
    found: dict[Node, tuple[int, int]] = {}
    for user in node.users:
        if user.target is aten.unbind.int:
            elements = {element: element.args[1] for element in user.users}
        elif user.target is aten.select.int:
            elements = {user: user.args[2]}
        else:
            return {}
        dim = wrap(argument(user, 1, "dim", 0), value.dim())
        for element, index in elements.items():
            if not isinstance(index, int):
                return {}
            length = tensor_of(node).shape[dim]
            if index < 0 and not isinstance(length, int):
                return {}
            found[element] = (dim, index % length if index < 0 else index)
    return found
