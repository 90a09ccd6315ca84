"""Graphs as text without node numbers, as what changed between two, and run by name."""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from focus_compile.axes.propagate import label
from focus_compile.capture.canonical import Canonical, canonicalize
from focus_compile.plan.plan import SCORED, Plan, make_plan
from tests.passes.tiny import NUMBERS, Model, Symbolic, Values, captured, model

_NUMBERED = re.compile(r"_(default|int|tensor|\d+)(?=_|$)")
"""What the tracer adds to the name of an operator."""


@dataclass(frozen=True)
class Subject:
    """A canonical graph, its plan, and what the function that was traced calls its inputs."""

    canonical: Canonical
    plan: Plan
    names: Mapping[str, str]

    def lines(self, gm: GraphModule) -> list[str]:
        """``name = operator(operands)`` in order; sizes stand where they are read."""
        return [
            f"{self._name(node)} = {_operator(node)}{self._operands(node)}"
            for node in gm.graph.nodes
            if node.op == "call_function" and not _is_size(node)
        ]

    def inputs(self, gm: GraphModule) -> list[str]:
        return [self._name(node) for node in gm.graph.nodes if node.op == "placeholder"]

    def outputs(self, gm: GraphModule) -> str:
        return self._text(gm.graph.output_node().args[0])

    def run(self, gm: GraphModule, values: Values) -> Mapping[str, Any]:
        """The values of all nodes by name; the graph's outputs by the name ``output``."""
        recorder = _Recorder(gm)
        with torch.no_grad():
            recorder.run(*[values[name] for name in self.inputs(gm)])
        return {node.name: value for node, value in recorder.seen.items()}

    def _name(self, node: Node) -> str:
        if node.op == "placeholder":
            return self.names.get(node.name, node.name)
        if _is_size(node):
            source, dim = node.args
            assert isinstance(source, Node)
            return f"{self._name(source)}.size({dim})"
        return _NUMBERED.sub("", node.name)

    def _operands(self, node: Node) -> str:
        keywords = [f"{name}={self._text(arg)}" for name, arg in node.kwargs.items()]
        return f"({', '.join([*map(self._text, node.args), *keywords])})"

    def _text(self, arg: Any) -> str:
        if isinstance(arg, list | tuple):
            return f"[{', '.join(map(self._text, arg))}]"
        return self._name(arg) if isinstance(arg, Node) else str(arg)


class _Recorder(Interpreter):
    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.seen: dict[Node, Any] = {}

    def run_node(self, n: Node) -> Any:
        self.seen[n] = super().run_node(n)
        return self.seen[n]


def _is_size(node: Node) -> bool:
    return node.target is torch.ops.aten.sym_size.int


def _operator(node: Node) -> str:
    if node.target is operator.getitem:
        return "getitem"
    return str(node.target).rpartition(".")[0]


def subject(
    values: Values,
    function: Model = model,
    symbolic: Symbolic = NUMBERS,
    scored: tuple[int, int] = SCORED,
) -> Subject:
    """Trace a function, and decide what the passes will do."""
    canonical = canonicalize(label(captured(values, function, symbolic)))
    arguments = list(values)
    pairs = zip(canonical.inputs, canonical.arguments, strict=True)
    names = {given.name: arguments[at.position] for given, at in pairs}
    return Subject(canonical, make_plan(canonical, scored), names)


def missing(lines: list[str], others: list[str]) -> list[str]:
    """Lines that others lack, in order, as often as they lack them."""
    left = Counter(others)
    out = []
    for line in lines:
        left[line] -= 1
        if left[line] < 0:
            out.append(line)
    return out


def snapshot(gm: GraphModule) -> list[Any]:
    """Everything that a pass could change in its input; metadata by identity."""
    out: list[Any] = [gm.code, {*gm.state_dict()}]
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        facts = (value.shape, value.stride(), value.dtype) if isinstance(value, Tensor) else value
        meta = {key: id(part) for key, part in node.meta.items()}
        users = [user.name for user in node.users]
        out.append((node, node.name, node.target, node.args, node.kwargs, users, meta, facts))
    return out
