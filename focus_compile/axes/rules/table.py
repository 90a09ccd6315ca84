"""The table of transfer rules, operator overload -> what it does to axes; how rules are written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch.fx import Node

from focus_compile.axes.axes import AxisMap, Dim, Dims, Transfer
from focus_compile.graph.nodes import aten
from focus_compile.ops.library import focus
from focus_compile.torch_private import OpOverload

__all__ = [
    "ARANGES",
    "AS_OTHERS",
    "EMBEDDINGS",
    "NAMED",
    "RESHAPES",
    "RULES",
    "fresh",
    "named",
    "one_result",
    "rule_of",
    "source",
    "transfer",
]

EMBEDDINGS = (aten.embedding.default, focus.embedding_shard.default)
ARANGES = (aten.arange.default, aten.arange.start, aten.arange.start_step)
RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
AS_OTHERS = {
    aten.expand_as.default: aten.expand.default,
    aten.view_as.default: aten.view.default,
    aten.reshape_as.default: aten.reshape.default,
}
"""Operators that take their sizes from a second operand, with those that are told them."""
Rule = Callable[[Node, AxisMap], Transfer]
_Key = TypeVar("_Key", OpOverload, str)
RULES: dict[OpOverload, Rule] = {}
NAMED: dict[str, Rule] = {}
"""Rules of operators that other packages define, once they are imported: by qualified name."""


def transfer(*ops: OpOverload) -> Callable[[Rule], Rule]:
    """Register a rule for ``ops``.

    Raises:
        ValueError: one of them has a rule.
    """
    return _register(RULES, ops)


def named(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for operators of other packages, by name, ``"namespace::operator"``.

    It is that of the overload ``default``.

    Raises:
        ValueError: one of them has a rule.
    """
    return _register(NAMED, names)


def _register(rules: dict[_Key, Rule], keys: Sequence[_Key]) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        for key in keys:
            if key in rules:
                raise ValueError(f"{key} has a rule already: {rules[key].__name__}")
            rules[key] = rule
        return rule

    return register


def rule_of(node: Node) -> Rule | None:
    """The rule of the operator that a node calls."""
    if isinstance(node.target, OpOverload) and node.target._overloadname == "default":
        return RULES.get(node.target) or NAMED.get(node.target._schema.name)
    return RULES.get(node.target)  # type: ignore[call-overload, no-any-return]


def one_result(*dims: Dim, mixed: Sequence[Dim] = ()) -> Transfer:
    """The transfer of an operator with one result."""
    return Transfer((tuple(dims),), tuple(mixed))


def source(node: Node) -> Node:
    """The first operand."""
    source = node.args[0]
    assert isinstance(source, Node)
    return source


def fresh(node: Node, axes: AxisMap) -> tuple[Dims, ...]:
    """New axes for every dim of every result."""
    value = node.meta["val"]
    results = value if isinstance(value, list | tuple) else [value]
    return tuple(
        tuple(axes.fresh(size) for size in result.shape) if isinstance(result, torch.Tensor) else ()
        for result in results
    )
