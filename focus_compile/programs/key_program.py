"""What computes the keys and values of a model, as a digest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from operator import attrgetter
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from focus_compile.plan.writes import Write
from focus_compile.torch_private import FakeTensor

__all__ = ["key_program"]


def key_program(gm: GraphModule, writes: Iterable[Write]) -> str:
    """A digest of what computes a block's keys and values in a canonical graph.

    Equal for all captures of one model whose calls differ in sizes, strides, history or outputs
    alone. Not equal when a number that is baked into the graph has changed, such as the scale of an
    adapter, or a layer is another one.
    """
    writes = list(writes)
    nodes = {node.name: node for node in gm.graph.nodes}
    joined = {nodes[write.cat]: nodes[write.new] for write in writes if write.cat is not None}
    wanted = {nodes[write.new] for write in writes}
    for node in reversed(gm.graph.nodes):
        if node in wanted:
            wanted.update([joined[node]] if node in joined else node.all_input_nodes)
    numbers: dict[Node, Any] = {}
    lines: list[str] = []
    for node in gm.graph.nodes:
        if node not in wanted:
            continue
        if node in joined:  # the history: the same for the whole of a block
            numbers[node] = numbers[joined[node]]
            continue
        numbers[node] = _Number(f"%{len(numbers)}")
        if node.op == "call_function":
            read: Any = map_arg((node.args, node.kwargs), numbers.__getitem__)
            lines.append(f"{node.target}{read}")
        elif node.op == "get_attr":
            lines.append(_constant(attrgetter(str(node.target))(gm)))
        else:
            lines.append("input")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


class _Number:
    """Stands for a node where arguments are written out."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def _constant(value: Tensor) -> str:
    if isinstance(value, FakeTensor):
        return f"{value.dtype}{tuple(value.shape)}"
    return f"{value.dtype}{value.tolist()}"
