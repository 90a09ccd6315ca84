"""Recompute every value of a graph under its fake mode and compare with what the nodes claim.

``graph.lint()`` accepts a stale shape; this does not. Nor does it accept a size that became a
literal: the numbers that stand for sizes are unmistakable (:mod:`focus_compile.graph.sizes`). Those
that the passes recorded end here: a compiler gets symbols in their place
(:func:`set_input_values`).
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node

from focus_compile.graph.nodes import fake_mode_of, graph_inputs
from focus_compile.graph.sizes import is_stand_in
from focus_compile.torch_private import tree_leaves

__all__ = ["InvalidGraph", "check_values", "no_constant_sizes", "set_input_values"]


class InvalidGraph(AssertionError):
    """A pass left a node whose recorded value is not what the node computes: a bug of ours."""


class _Recompute(Interpreter):
    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, torch.Tensor) and n.op != "output":
            claimed = n.meta["val"]
            if _metadata(value) != _metadata(claimed):
                raise InvalidGraph(
                    f"{n.format_node()} claims {_metadata(claimed)} but computes {_metadata(value)}"
                )
        return value

    def fetch_attr(self, target: str) -> Any:
        value = super().fetch_attr(target)
        return fake_mode_of(self.module).from_tensor(value)  # type: ignore[arg-type]


def _metadata(value: torch.Tensor) -> tuple[Any, ...]:
    return tuple(value.shape), value.dtype, value.device


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_values(gm: GraphModule) -> None:
    """Raise :class:`InvalidGraph` if a recorded shape, dtype or device is not true."""
    gm.graph.lint()
    no_constant_sizes(gm)
    values = [node.meta["val"] for node in graph_inputs(gm)]
    with fake_mode_of(gm), torch.no_grad():
        _Recompute(gm).run(*values)


def no_constant_sizes(gm: GraphModule) -> None:
    """Raise :class:`InvalidGraph` if a number that stands for a size is a literal of the graph, or
    the length of one of its constants.
    """
    for node in gm.graph.nodes:
        leaves = tree_leaves((node.args, node.kwargs))
        if node.op == "get_attr":
            constant = operator.attrgetter(str(node.target))(gm)
            leaves = list(constant.shape) if isinstance(constant, torch.Tensor) else []
        if any(is_stand_in(leaf) for leaf in leaves if _is_int(leaf)):
            raise InvalidGraph(f"a size became a constant: {node.format_node()}")


def set_input_values(gm: GraphModule, inputs: Sequence[Any]) -> GraphModule:
    """Make a graph fit for a compiler, in place: its inputs claim what they are compiled for.

    The passes' fake tensors have numbers for sizes, and Inductor compiles for what the inputs of a
    graph claim where it finds that (``cpp_wrapper`` does), not for the inputs that it is given.

    Raises:
        InvalidGraph: a number that stands for a size is left in the graph or its inputs.
    """
    values = iter(inputs)
    for node in gm.graph.nodes:
        node.meta.pop("val", None)
        if node.op == "placeholder":
            node.meta["val"] = value = next(values)
            if any(is_stand_in(size) for size in value.shape if _is_int(size)):
                raise InvalidGraph(f"a size became a constant: {node.format_node()}")
    no_constant_sizes(gm)
    return gm
