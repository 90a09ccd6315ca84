"""A sign of life: which program is being compiled, told to the log and to whoever shows it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from rich.progress import Progress, TaskID

__all__ = ["compiling", "shown", "watching"]

log = logging.getLogger(__name__)

Show = Callable[[str | None], None]
_SHOW: ContextVar[Show | None] = ContextVar("show", default=None)


@contextmanager
def compiling(program: str, operators: int) -> Iterator[None]:
    """Around the compilation of a program, or the analysis of a graph, of so many operators.

    One line at INFO tells what was compiled, and how long it took.
    """
    what = f"{program} ({operators} operators)"
    show = _SHOW.get() or _nothing
    show(what)
    start = time.perf_counter()
    try:
        yield
        log.info("compiled %s in %.1f s", what, time.perf_counter() - start)
    finally:
        show(None)


@contextmanager
def watching(show: Show) -> Iterator[None]:
    """Call ``show`` with what is being compiled in this thread, and with None when it is."""
    token = _SHOW.set(show)
    try:
        yield
    finally:
        _SHOW.reset(token)


@contextmanager
def shown(bar: Progress, task: TaskID) -> Iterator[None]:
    """While something is compiled, the task's description says what."""
    description = bar.tasks[task].description

    def show(what: str | None) -> None:
        bar.update(task, description=description if what is None else f"compiling {what}")

    with watching(show):
        yield


def _nothing(_: str | None) -> None:
    pass
