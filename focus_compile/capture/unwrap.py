"""Tensors made of others, as quantised weights are -> these others, each an input of its own.

linear(x, weight)   ->   mul(mm(view(x), to(t(weight.qdata))), view(weight.scale))

What operators make of such a tensor is for its class to say, when they are dispatched. So each
operator of Dynamo's graph that reads one is traced alone, and what its class calls stands in its
place; all others stay as they are. Then axes, passes and programs see ordinary operators.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from focus_compile.errors import Unsupported
from focus_compile.graph.nodes import graph_inputs, graph_outputs
from focus_compile.refusals import RETURNS_TENSOR_OF_TENSORS, TENSOR_OF_TENSORS
from focus_compile.torch_private import (
    FakeTensor,
    is_made_of_tensors,
    is_module_state,
    make_fx,
    tree_flatten,
    tree_leaves,
    tree_unflatten,
)

__all__ = ["Part", "Unwrapped", "unwrap"]

_PROVENANCE = ("nn_module_stack", "source_fn_stack", "stack_trace")


@dataclass(frozen=True)
class Part:
    """A tensor that another one is made of: the argument, and names that lead to it."""

    argument: int
    path: str

    def of(self, args: Sequence[Any]) -> torch.Tensor:
        """The tensor itself, in a call's arguments; it shares the argument's memory."""
        part: torch.Tensor = attrgetter(self.path)(args[self.argument])
        return part


@dataclass(frozen=True)
class Unwrapped:
    """A Dynamo graph whose operators read plain tensors; what its last inputs are, by position."""

    gm: GraphModule
    parts: dict[int, Part]


def unwrap(gm: GraphModule) -> Unwrapped:
    """Give a Dynamo graph, behind its own inputs, those that weights and buffers are made of.

    The inputs that are made of others stay, and nothing reads them. A graph without any comes back
    as it is.

    Raises:
        Unsupported: an input is such a tensor, and no weight or buffer; or processes share out what
            it is made of; or the graph returns one.
    """
    inputs = graph_inputs(gm)
    if not any(is_made_of_tensors(node.meta["example_value"]) for node in inputs):
        return Unwrapped(gm, {})
    graph = _Graph(gm)
    parts = [part for index, node in enumerate(inputs) for part in graph.add_parts(index, node)]
    for node in gm.graph.nodes:
        if node.op == "output":
            graph.finish(node)
        elif node.op != "placeholder":
            graph.add(node)
    return Unwrapped(
        GraphModule(graph.attributes, graph.graph), dict(enumerate(parts, start=len(inputs)))
    )


class _Graph:
    """A copy of a Dynamo graph that reads plain tensors.

    ``env`` has a node for each node of the original, or, where its value is made of others, the
    nodes of these, in the order of :func:`_taken_apart`.
    """

    def __init__(self, gm: GraphModule) -> None:
        self.gm, self.graph = gm, Graph()
        self.env: dict[Node, Any] = {node: self.graph.node_copy(node) for node in graph_inputs(gm)}
        self.attributes: dict[str, Any] = {}

    def add_parts(self, index: int, node: Node) -> list[Part]:
        """Add an input for each tensor that an input is made of."""
        value = node.meta["example_value"]
        if not is_made_of_tensors(value):
            return []
        leaves = dict(_leaves(value))
        if not is_module_state(node) or any(isinstance(leaf, DTensor) for leaf in leaves.values()):
            raise Unsupported(TENSOR_OF_TENSORS, kind=type(value).__name__)
        self.env[node] = []
        for path, leaf in leaves.items():
            made = self.graph.placeholder(f"{node.name}_{path.replace('.', '_')}")
            weight = isinstance(value, torch.nn.Parameter)
            made.meta["example_value"] = torch.nn.Parameter(leaf, False) if weight else leaf
            made.meta["part"] = True
            self.env[node].append(made)
        return [Part(index, path) for path in leaves]

    def add(self, node: Node) -> None:
        """Add an operator, or what it comes to for plain tensors."""
        if any(_holds_wrapped(arg) for arg in node.all_input_nodes):
            self._inline(node)
            return
        if node.op == "get_attr":
            self.attributes[str(node.target)] = attrgetter(str(node.target))(self.gm)
        self.env[node] = self.graph.node_copy(node, self.env.__getitem__)

    def finish(self, output: Node) -> None:
        for node in output.all_input_nodes:
            if _holds_wrapped(node):
                raise Unsupported(RETURNS_TENSOR_OF_TENSORS, node)
        self.graph.output(map_arg(output.args[0], self.env.__getitem__))
        self.graph.lint()

    def _inline(self, node: Node) -> None:
        sources = node.all_input_nodes
        values = [source.meta["example_value"] for source in sources]
        made: list[_Nest] = []

        def call(given: Sequence[Any]) -> list[Any]:
            plain = iter(given)
            env = {
                source: _put_together(plain, _taken_apart(value).nest)
                for source, value in zip(sources, values, strict=True)
            }
            args, kwargs = map_arg((node.args, node.kwargs), env.__getitem__)
            target: Any = node.target
            if node.op == "call_method":
                target, args = getattr(args[0], target), args[1:]
            result = _taken_apart(target(*args, **kwargs))
            made.append(result.nest)
            return result.plain

        given = [leaf for value in values for leaf in _taken_apart(value).plain]
        nodes = [leaf for source in sources for leaf in tree_leaves(self.env[source])]
        mode = next(value.fake_mode for value in given if isinstance(value, FakeTensor))
        with mode:
            traced = make_fx(call)(given)
        results = self._append(traced, nodes, node)
        self.env[node] = results if _holds_wrapped(node) else tree_unflatten(results, made[0].tree)

    def _append(self, traced: GraphModule, given: list[Node], like: Node) -> list[Any]:
        env: dict[Node, Any] = dict(zip(graph_inputs(traced), given, strict=True))
        traced.graph.eliminate_dead_code()
        for node in traced.graph.nodes:
            if node.op == "get_attr":
                name = f"unwrapped_constant{len(self.attributes)}"
                self.attributes[name] = getattr(traced, str(node.target))
                env[node] = self.graph.get_attr(name)
            elif node.op == "call_function":
                env[node] = self.graph.node_copy(node, env.__getitem__)
                env[node].meta = {key: like.meta[key] for key in _PROVENANCE if key in like.meta}
        results: list[Any] = map_arg(graph_outputs(traced), env.__getitem__)
        return list(results)


@dataclass(frozen=True)
class _Made:
    """How a tensor is put together: its class, and what that wants besides the parts."""

    kind: type
    names: tuple[str, ...]
    context: Any
    shape: torch.Size
    stride: tuple[int, ...]
    parts: _Nest


@dataclass(frozen=True)
class _Nest:
    """A nest of values without these: its form, and for each leaf that is made of others, how."""

    tree: Any
    made: tuple[_Made | None, ...]


@dataclass(frozen=True)
class _Apart:
    """A nest of values, taken apart: plain leaves, in order, and the rest."""

    plain: list[Any]
    nest: _Nest


def _taken_apart(value: Any) -> _Apart:
    leaves, tree = tree_flatten(value)
    plain: list[Any] = []
    made: list[_Made | None] = []
    for leaf in leaves:
        if not is_made_of_tensors(leaf):
            plain.append(leaf)
            made.append(None)
            continue
        names, context = leaf.__tensor_flatten__()
        parts = _taken_apart([getattr(leaf, name) for name in names])
        plain += parts.plain
        made.append(_Made(type(leaf), tuple(names), context, leaf.shape, leaf.stride(), parts.nest))
    return _Apart(plain, _Nest(tree, tuple(made)))


def _put_together(plain: Iterator[Any], nest: _Nest) -> Any:
    """The reverse, of other plain leaves."""
    leaves = []
    for made in nest.made:
        if made is None:
            leaves.append(next(plain))
            continue
        parts = dict(zip(made.names, _put_together(plain, made.parts), strict=True))
        kind: Any = made.kind
        leaves.append(kind.__tensor_unflatten__(parts, made.context, made.shape, made.stride))
    return tree_unflatten(leaves, nest.tree)


def _holds_wrapped(node: Node) -> bool:
    return any(map(is_made_of_tensors, tree_leaves(node.meta.get("example_value"))))


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Plain tensors that ``value`` is made of, however deep, each by its path."""
    for name in value.__tensor_flatten__()[0]:
        part = getattr(value, name)
        if is_made_of_tensors(part):
            yield from _leaves(part, f"{path}{name}.")
        else:
            yield f"{path}{name}", part
