"""A masked call that is interrupted, or runs out of memory, wherever it stands."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.fx import GraphModule, Interpreter, Node

import focus_compile
from focus_compile.programs.program import Program
from focus_compile.runtime.executable import Executable
from tests.faults.steps import Steps, new_run, retry, same
from tests.support.harness import Call, Run

STRIDE = 8
"""Every how many lines of the package a call is interrupted."""


@pytest.fixture(scope="module")
def run() -> Run:
    return new_run()


@pytest.fixture(scope="module")
def steps(run: Run) -> Steps:
    return Steps.of(run)


class Failing(Interpreter):
    """A program that fails at its n-th node."""

    def __init__(self, gm: GraphModule, left: int, error: BaseException) -> None:
        super().__init__(gm)
        self.left, self.error = left, error

    def run_node(self, n: Node) -> Any:
        self.left -= 1
        if self.left < 0:
            raise self.error
        return super().run_node(n)


@contextmanager
def failing(program: Program, share: float, error: BaseException) -> Iterator[None]:
    """Fails after this share of its nodes, with the values of those before alive."""
    count = len(program.half.gm.graph.nodes)
    gm = program.half.gm

    def fail(*args: Any) -> Any:
        return Failing(gm, int(share * (count - 1)), error).run(*args)

    with patch.object(program, "compiled", fail):
        yield


ERRORS = {  # made anew for each test: an error that is kept keeps the frames that it passed
    KeyboardInterrupt: "",
    torch.OutOfMemoryError: "CUDA out of memory",
    MemoryError: "",
    RuntimeError: "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory",
}


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("half", ["prefix", "suffix"])
def test_a_program_fails(
    run: Run, steps: Steps, half: str, share: float, kind: type[BaseException]
) -> None:
    """The caller sees the error itself; the same call starts the block anew."""
    (executable,) = run.executables
    error = kind(ERRORS[kind])

    def fault(call: Call) -> None:
        program = getattr(executable, half)
        with failing(program, share, error), pytest.raises(kind) as caught:
            run.compiled(**call.kwargs(run.model))
        assert caught.value is error

    logits, focus = retry(run, steps, fault)
    assert same(logits, steps.fresh)
    assert focus.stats.steps == 2


@pytest.mark.parametrize("half", ["prefix", "suffix"])
def test_memory_of_a_failed_call_is_free(run: Run, steps: Steps, half: str) -> None:
    """Neither session nor programs hold anything of it: the slots of the block are free too."""
    (executable,) = run.executables
    with focus_compile.session() as focus:
        run.logits(steps.calls[0])
        (state,) = focus._states.values()
        alive = [weakref.ref(slot) for slot in state.slots.values()]
        assert alive and all(ref() is not None for ref in alive)
        del state
        error = torch.OutOfMemoryError("CUDA out of memory")
        with failing(getattr(executable, half), 0.9, error):
            try:
                run.compiled(**steps.calls[1].kwargs(run.model))
            except torch.OutOfMemoryError as caught:
                assert caught is error
                caught.__traceback__ = None
        gc.collect()
        assert not any(ref() is not None for ref in alive)


class Interrupt:
    """Raises KeyboardInterrupt at the n-th line that the package runs in one call."""

    def __init__(self, line: int) -> None:
        self.line, self.seen = line, 0
        self.at = ""

    def __call__(self, frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_globals.get("__name__", "").split(".")[0] != "focus_compile":
            return None
        if event == "line":
            self.seen += 1
            if self.seen == self.line:
                sys.settrace(None)
                self.at = f"{frame.f_code.co_qualname}:{frame.f_lineno}"
                raise KeyboardInterrupt
        return self


@contextmanager
def interrupted(line: int) -> Iterator[Interrupt]:
    """Inside, calls of compiled models are interrupted at this line of theirs."""
    interrupt, call = Interrupt(line), Executable.__call__

    def traced(self: Executable, *args: Any) -> Any:
        before = sys.gettrace()
        sys.settrace(interrupt)
        try:
            return call(self, *args)
        finally:
            sys.settrace(before)

    with patch.object(Executable, "__call__", traced):
        yield interrupt


def test_interrupted_at_any_line(run: Run, steps: Steps) -> None:
    """The next call goes on as if the interrupted one had not been, or starts the block anew."""
    kinds: dict[str, int] = {"goes on": 0, "fresh": 0}
    wrong: list[str] = []
    line, reached = 1, True
    while reached:
        reached = False

        def fault(call: Call) -> None:
            nonlocal reached
            with interrupted(line) as interrupt:  # noqa: B023
                try:
                    run.compiled(**call.kwargs(run.model))
                except KeyboardInterrupt:
                    reached = True
            at[:] = [interrupt.at]  # noqa: B023

        at: list[str] = []
        logits, _ = retry(run, steps, fault)
        if reached:
            if same(logits, steps.second):
                kinds["goes on"] += 1
            elif same(logits, steps.fresh):
                kinds["fresh"] += 1
            else:
                wrong += at
        line += STRIDE
    assert not wrong
    assert kinds["goes on"] > 3 and kinds["fresh"] > 15, kinds
