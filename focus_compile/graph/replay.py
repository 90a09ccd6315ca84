"""Re-emit a graph node by node under fake tensors, so that every ``meta["val"]`` is true.

The passes build their result with a :class:`Replay` instead of editing nodes in place: sizes that
the tracer baked into ``view`` and ``expand`` are given anew, and provenance is carried along.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import Argument, map_arg

from focus_compile.errors import Unsupported
from focus_compile.graph.inputs import Input, static_tensor
from focus_compile.graph.nodes import fake_mode_of, graph_outputs
from focus_compile.refusals import OTHER_SIZES
from focus_compile.torch_private import FakeTensorMode, OpOverload, symbolic_mode

__all__ = ["Replay"]

PROVENANCE = (
    "nn_module_stack",
    "stack_trace",
    "source_fn_stack",
    "tensor_dict",
    "_dynamo_source",
    "shard",
)


class Replay:
    """A graph under construction, whose values are fake tensors of one fake mode.

    ``owner`` is the module of the graph that is replayed: constants are taken from it.
    """

    def __init__(
        self, owner: GraphModule, fake_mode: FakeTensorMode, *, keep_names: bool = True
    ) -> None:
        self.graph = Graph()
        self.owner = owner
        self.fake_mode = fake_mode
        self.keep_names = keep_names
        self.attributes: dict[str, Any] = {}
        self._emitted: dict[Any, Node] = {}

    @classmethod
    def copy(cls, gm: GraphModule) -> tuple[Replay, dict[str, Node], Any]:
        """A graph to append to: its copy, its nodes by name, and its outputs."""
        replay = cls(gm, fake_mode_of(gm))
        env: dict[Node, Node] = {}
        for node in gm.graph.nodes:
            if node.op == "get_attr":
                replay.attributes[node.target] = operator.attrgetter(node.target)(gm)
            if node.op != "output":
                env[node] = replay.graph.node_copy(node, lambda arg: env[arg])
        outputs = map_arg(graph_outputs(gm), lambda arg: env[arg])
        return replay, {node.name: node for node in env.values()}, outputs

    def before(self, node: Node) -> AbstractContextManager[None]:
        """Insert what is called in this context before a node of a copied graph."""
        return self.graph.inserting_before(node)

    def placeholder(self, name: str, value: Any, like: Node | None = None) -> Node:
        first_call = next((node for node in self.graph.nodes if node.op != "placeholder"), None)
        with self.graph.inserting_before(first_call) if first_call is not None else nullcontext():
            node = self.graph.create_node("placeholder", name, name=name)
        return self._finish(node, value, like)

    def add_input(self, spec: Input) -> Node:
        """Add an input that the model's own graph does not have."""
        return self.placeholder(spec.name, static_tensor(self.fake_mode, spec))

    def attribute(self, like: Node) -> Node:
        """Carry a constant over."""
        name = str(like.target)
        self.attributes[name] = operator.attrgetter(name)(self.owner)
        node = self.graph.create_node("get_attr", name, name=like.name)
        return self._finish(node, like.meta["val"], like)

    def call(
        self,
        target: Any,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any] | None = None,
        *,
        like: Node | None = None,
        name: str | None = None,
    ) -> Node:
        """Append ``target(*args)``; its value is computed from the values of its arguments.

        Raises:
            Unsupported: an operator of the model (``like``) fails on operands of these sizes.
        """
        kwargs = dict(kwargs or {})
        values = map_arg((args, kwargs), lambda node: node.meta["val"])
        with symbolic_mode(self.fake_mode), torch.no_grad():
            try:
                value = target(*values[0], **values[1])
            except (RuntimeError, ValueError, IndexError) as error:
                if like is None:
                    raise
                line = str(error).partition("\n")[0]
                raise Unsupported(OTHER_SIZES, like, error=line) from error
        node_name = name or (like.name if like is not None and self.keep_names else None)
        node = self.graph.create_node("call_function", target, args, kwargs, name=node_name)
        return self._finish(node, value, like)

    def once(
        self,
        target: Any,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any] | None = None,
        *,
        like: Node | None = None,
    ) -> Node:
        """As :meth:`call`, but a call that was made before is not made again."""
        key = (target, _frozen(args), _frozen(dict(kwargs or {})))
        if key not in self._emitted or not _repeatable(target):
            self._emitted[key] = self.call(target, args, kwargs, like=like)
        return self._emitted[key]

    def size(self, node: Node, dim: int) -> Node:
        """Size of a value along a dim, as a node."""
        return self.once(torch.ops.aten.sym_size.int, (node, dim))

    def product(self, *sizes: Node | int) -> Node | int:
        return self._fold(operator.mul, 1, sizes)

    def total(self, *sizes: Node | int) -> Node | int:
        return self._fold(operator.add, 0, sizes)

    def finish(self, outputs: Argument) -> GraphModule:
        """Close the graph; nothing may be added after."""
        self.graph.output(outputs)
        self.graph.lint()
        return GraphModule(self.attributes, self.graph)

    def _fold(self, op: Callable[..., Any], unit: int, sizes: tuple[Node | int, ...]) -> Node | int:
        result: Node | int = unit
        for size in sizes:
            if result == unit:
                result = size
            elif size != unit:
                result = self._arithmetic(op, result, size)
        return result

    def _arithmetic(
        self, op: Callable[..., Any], left: Node | int, right: Node | int
    ) -> Node | int:
        if isinstance(left, int) and isinstance(right, int):
            return int(op(left, right))
        return self.once(op, (left, right))

    def _finish(self, node: Node, value: Any, like: Node | None) -> Node:
        node.meta["val"] = value
        if like is not None:
            for key in PROVENANCE:
                if key in like.meta:
                    node.meta[key] = like.meta[key]
        return node


def _repeatable(target: Any) -> bool:
    """Whether a second call with the same arguments gives the same, and does nothing else."""
    if not isinstance(target, OpOverload):
        return True
    return not target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in target.tags


def _frozen(value: Any) -> Any:
    """Arguments of a call as a dictionary key; numbers of different types stay different."""
    if isinstance(value, list | tuple):
        return tuple(map(_frozen, value))
    if isinstance(value, dict):
        return tuple((name, _frozen(item)) for name, item in value.items())
    return type(value), value
