"""Which model a graph's arguments belong to, with which weights, and what computes its keys."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.nn import Parameter

from focus_compile.shards import local
from focus_compile.sites import Write
from focus_compile.torch_private import FakeTensor

__all__ = ["NO_WEIGHTS", "Weights", "key_program", "model_key", "weights_of"]


def model_key(args: Sequence[Any]) -> tuple[int, ...]:
    """What tells one model from another: its parameters, among a graph's arguments."""
    return tuple(id(arg) for arg in args if isinstance(arg, Parameter))


@dataclass(frozen=True, eq=False)
class Weights:
    """What keys and values depend on besides the call: other ones belong to another state.

    Attributes:
        memory: of parameters and buffers, with how often it was written to.
        buffers: the buffers themselves, so that their memory is nobody else's meanwhile.
        program: what computes keys and values (:func:`key_program`).
    """

    memory: tuple[tuple[int, int], ...] = ()
    buffers: tuple[Tensor, ...] = ()
    program: str = ""

    def same(self, other: Weights) -> bool:
        return (
            self.memory == other.memory
            and self.program == other.program
            and len(self.buffers) == len(other.buffers)
            and all(one is two for one, two in zip(self.buffers, other.buffers, strict=True))
        )


NO_WEIGHTS = Weights()
"""Of calls whose state is dropped."""


def weights_of(args: Sequence[Any], buffers: Sequence[int] = (), program: str = "") -> Weights:
    """Of a call; ``buffers``: which arguments are the model's own, parameters excepted."""
    held = tuple(args[index] for index in buffers)
    parts = [local(arg) for arg in (*(a for a in args if isinstance(a, Parameter)), *held)]
    memory = ((part.data_ptr(), 0 if part.is_inference() else part._version) for part in parts)
    return Weights(tuple(memory), held, program)


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
