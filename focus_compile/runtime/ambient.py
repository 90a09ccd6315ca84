"""Which session a call belongs to.

Python has one context per thread and task, but none per generator: what a generator sets in its
context, the code that advances it has too. So a session remembers whose it is:

- entered while nothing but plain functions ran: it holds in its context, as a context variable;
- entered while a coroutine ran: likewise, since tasks have contexts of their own;
- entered while a generator ran, in it or in what it called: it holds where that generator is on
  the stack, in whichever thread or task that is advanced, and nowhere else. Threads that an
  asynchronous generator waits for (``asyncio.to_thread``) count, one of its ``yield`` does not.

A generator that is the body of a context manager or a fixture (``contextlib``, pytest) yields on
purpose while others work: its session is that of the code that entered the context manager.
"""

from __future__ import annotations

import dis
import inspect
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from focus_compile.runtime.session import Session

__all__ = ["Scope", "current_session", "inside", "open_elsewhere"]

KEEPERS = ("contextlib", "_pytest", "pluggy", "pytest_asyncio")
"""Packages that advance a generator to its ``yield`` in order to work inside of its ``with``."""

_ASYNC = inspect.CO_ASYNC_GENERATOR
_AWAITS = inspect.CO_COROUTINE | inspect.CO_ITERABLE_COROUTINE
_RESUMABLE = inspect.CO_GENERATOR | inspect.CO_COROUTINE | _ASYNC
_RESUME, _SEND = dis.opmap["RESUME"], dis.opmap["SEND"]
_AFTER_YIELD = 1  # RESUME's argument, as module dis documents it: 3 after an await


class Scope:
    """A session from its ``with`` to the end of it.

    Attributes:
        session: the session; frame: that of the generator or coroutine that it belongs to, or None.
        ambient: a user's ``with``; else a request's own session, around one call of its model.
    """

    def __init__(self, session: Session, ambient: bool = True) -> None:
        self.session = session
        self.ambient = ambient
        self.frame: FrameType | None = None

    def enter(self) -> None:
        self.frame = _owner(sys._getframe(1))
        _OPEN.add(self)
        _ENTERED.set((*(scope for scope in _ENTERED.get() if scope in _OPEN), self))

    def exit(self) -> None:
        """From any thread, task or context."""
        _OPEN.remove(self)
        self.frame = None  # contexts that were copied keep the scope
        _ENTERED.set(tuple(scope for scope in _ENTERED.get() if scope is not self))

    def holds(self, here: list[FrameType]) -> bool:
        """Whether a call in a context that has this scope is inside of it."""
        if self not in _OPEN:
            return False
        if self.frame is None or self.frame in here:
            return True
        flags = self.frame.f_code.co_flags
        return bool(flags & _AWAITS) or (bool(flags & _ASYNC) and not _has_yielded(self.frame))


class _Open:
    """Scopes that are open in this process, by frame: each is here from its enter to its exit.

    That cannot be in a context: a generator may be advanced in any.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.scopes: dict[FrameType | None, list[Scope]] = {}

    def add(self, scope: Scope) -> None:
        with self.lock:
            self.scopes.setdefault(scope.frame, []).append(scope)

    def remove(self, scope: Scope) -> None:
        with self.lock:
            here = self.scopes.get(scope.frame, [])
            if scope in here:
                here.remove(scope)
            if not here:
                self.scopes.pop(scope.frame, None)

    def __contains__(self, scope: Scope) -> bool:
        return scope in self.scopes.get(scope.frame, ())

    def all(self) -> list[Scope]:
        with self.lock:
            return [scope for scopes in self.scopes.values() for scope in scopes]


_OPEN = _Open()
_ENTERED: ContextVar[tuple[Scope, ...]] = ContextVar("focus_compile_sessions", default=())


def current_session() -> Session | None:
    """The innermost session around this call; None outside of all."""
    entered, scopes = _ENTERED.get(), _OPEN.scopes
    if not entered and not scopes:
        return None
    here: list[FrameType] = []
    inside_task = True
    for frame in _stack(sys._getframe(1)) if scopes.keys() - {None} else ():
        found = scopes.get(frame)
        if found:
            if inside_task:
                return found[-1].session
            here.append(frame)
        if frame.f_code.co_flags & inspect.CO_COROUTINE and _delegator(frame) is None:
            inside_task = False  # below is the event loop: another context
    held = [scope for scope in entered if scope.holds(here)]
    waiting = {scope.frame for scope in held if scope.frame and scope.frame not in here}
    if sum(bool(frame.f_code.co_flags & _ASYNC) for frame in waiting) > 1:
        return None  # two streams wait for threads: whose this is cannot be told
    if held:
        return held[-1].session
    return scopes[here[0]][-1].session if here else None


@contextmanager
def inside(session: Session) -> Iterator[None]:
    """Around one call of a model: it belongs to this session."""
    scope = Scope(session, ambient=False)
    scope.enter()
    try:
        yield
    finally:
        scope.exit()


def open_elsewhere() -> list[Session]:
    """Sessions that are open anywhere in this process; for calls that are in none."""
    return [scope.session for scope in _OPEN.all() if scope.ambient]


def _owner(frame: FrameType | None) -> FrameType | None:
    """The innermost generator or coroutine on the stack, bodies of context managers excepted."""
    while frame is not None:
        if frame.f_code.co_flags & _RESUMABLE:
            while (outer := _delegator(frame)) is not None:
                frame = outer
            if not _is_kept(frame):
                return frame
        frame = frame.f_back
    return None


def _is_kept(frame: FrameType) -> bool:
    """Whether a generator is advanced by one of the :data:`KEEPERS`."""
    if frame.f_back is None or frame.f_code.co_flags & inspect.CO_COROUTINE:
        return False
    return str(frame.f_back.f_globals.get("__name__")).partition(".")[0] in KEEPERS


def _delegator(frame: FrameType) -> FrameType | None:
    """The frame whose ``yield from`` or ``await`` runs this one: together they are one stream."""
    outer = frame.f_back
    if outer is None or frame.f_code.co_flags & _ASYNC:
        return None  # awaited is one step of an asynchronous generator, not the whole of it
    if not outer.f_code.co_flags & _RESUMABLE:
        return None
    code, at = outer.f_code.co_code, outer.f_lasti
    return outer if _SEND in (code[at], code[max(at - 2, 0)]) else None


def _has_yielded(frame: FrameType) -> bool:
    """Whether an asynchronous generator is suspended at a ``yield``, and not at an ``await``."""
    code = frame.f_code.co_code
    for at in (frame.f_lasti, frame.f_lasti + 2):  # from 3.13 on, the last instruction is RESUME
        if code[at] == _RESUME:
            return code[at + 1] & 3 == _AFTER_YIELD
    return False


def _stack(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back
