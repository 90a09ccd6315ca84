"""What is in the way of a call: exceptions in the signal, and amid the nodes of a program."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from torch import Tensor
from torch.fx import Interpreter, Node

from focus_compile.programs.program import Program
from focus_compile.runtime.session import Session


class Accident(Exception):
    """What a caller, or a signal handler, throws into a call."""


@contextmanager
def failing_signal(focus: Session) -> Iterator[None]:
    def fail(_: Any) -> Any:
        raise Accident

    focus.signal = fail
    try:
        yield
    finally:
        focus.signal = None


class _Failing(Interpreter):
    """Runs a program up to one of its nodes."""

    def __init__(self, program: Program, last: int) -> None:
        super().__init__(program.half.gm)
        count = len(program.half.gm.graph.nodes)
        self.left = last % count

    def run_node(self, n: Node) -> Any:
        self.left -= 1
        if self.left < 0:
            raise Accident
        return super().run_node(n)


@contextmanager
def failing_program(suffix: bool, node: int) -> Iterator[None]:
    """Prefix or suffix is interrupted at a node."""
    run = Program.__call__

    def fail(self: Program, values: dict[str, Tensor]) -> dict[str, Tensor]:
        if ("tokens" in self.half.inputs) != suffix:
            return run(self, values)
        _Failing(self, node).run(*(values[name] for name in self.half.inputs))
        raise Accident

    with patch.object(Program, "__call__", fail):
        yield
