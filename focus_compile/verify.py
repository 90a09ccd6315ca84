"""Recompute every value of a graph under its fake mode and compare with what the nodes claim.

``graph.lint()`` accepts a stale shape; this does not. Nor does it accept a size that became a
literal: the numbers that stand for sizes are unmistakable (:mod:`focus_compile.inputs`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node

from focus_compile.axes import graph_inputs
from focus_compile.inputs import is_generic
from focus_compile.replay import fake_mode_of
from focus_compile.torch_private import tree_leaves

__all__ = ["InvalidGraph", "verify"]


class InvalidGraph(AssertionError):
    """A pass left a node whose recorded value is not what the node computes: a bug of ours."""


class _Recompute(Interpreter):
    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, torch.Tensor) and n.op != "output":
            claimed = n.meta["val"]
            if _facts(value) != _facts(claimed):
                raise InvalidGraph(
                    f"{n.format_node()} claims {_facts(claimed)} but computes {_facts(value)}"
                )
        return value

    def fetch_attr(self, target: str) -> Any:
        value = super().fetch_attr(target)
        return fake_mode_of(self.module).from_tensor(value)  # type: ignore[arg-type]


def _facts(value: torch.Tensor) -> tuple[Any, ...]:
    return tuple(value.shape), value.dtype, value.device


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def verify(gm: GraphModule) -> None:
    """Raise :class:`InvalidGraph` if a recorded shape, dtype or device is not true."""
    gm.graph.lint()
    for node in gm.graph.nodes:
        if any(is_generic(leaf) for leaf in tree_leaves((node.args, node.kwargs)) if _is_int(leaf)):
            raise InvalidGraph(f"a size became a constant: {node.format_node()}")
    values = [node.meta["val"] for node in graph_inputs(gm)]
    with fake_mode_of(gm), torch.no_grad():
        _Recompute(gm).run(*values)
