"""The session of calls that are in none: one per thread.

A loop that knows nothing of this package calls its compiled model step by step, and decodes where
it likes. It gets what a session gives: rows, blocks and histories are told apart, averages are
counted, and a token that was decoded where nothing was computed is an error at the next call. What
it cannot say is found by looking (docs/algorithm.md section 15):

- a row of which nothing was decoded since the last call starts anew, so that a call that is made
  twice gives the same twice;
- tokens behind what the loop has decoded so far are not evicted;
- where a step takes several calls, nothing is; rows that are decoded together keep the same tokens
  (:mod:`focus_compile.runtime.turns`).

The state of a model dies with it, or with the thread. It holds keys and values of its last call,
and of one from which a past was completed.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from focus_compile.runtime.ambient import current_session
from focus_compile.runtime.block import BlockState, History
from focus_compile.runtime.session import Session
from focus_compile.runtime.statistics import SessionStats
from focus_compile.runtime.turns import Turns

__all__ = ["session_here"]


class _Implicit(Session):
    """What calls of one thread share that are in no other session."""

    implicit = True

    def __init__(self) -> None:
        super().__init__()
        self._turns: dict[tuple[int, ...], Turns] = {}
        self._alive: dict[tuple[int, ...], weakref.ref[Tensor]] = {}

    @contextmanager
    def calling(self) -> Iterator[None]:
        """Around one call, of which nothing is counted: nobody asks."""
        self.stats = SessionStats()
        try:
            with super().calling():
                yield
        finally:
            self.retain_mask = self.rescue_mask = self.scores = None

    def keep(self, key: tuple[int, ...], state: BlockState) -> None:
        if not key:
            return  # no parameter: nothing would tell it from another model, or when it is gone
        super().keep(key, state)
        self._turns.setdefault(key, Turns()).note(state)
        owner = state.weights.owners[0]()
        if key not in self._alive and owner is not None:
            self._alive[key] = weakref.ref(owner, lambda _: self._end(key))

    def others(
        self, key: tuple[int, ...], ids: Tensor, masked: Tensor, history: History, shifted: bool
    ) -> Tensor | None:
        """As :meth:`Session.others`.

        Raises:
            EvictedTokenDecoded: a token was decoded that the call it goes on from had evicted.
        """
        return self._turns.setdefault(key, Turns()).take(ids, masked, history, shifted)

    def reset(self) -> None:
        super().reset()
        self._turns.clear()

    def _end(self, key: tuple[int, ...]) -> None:
        self._alive.pop(key, None)
        self.forget(key)
        self.origins.forget(key)
        self._turns.pop(key, None)


class _Here(threading.local):
    def __init__(self) -> None:
        self.session = _Implicit()


_HERE = _Here()


def session_here() -> Session:
    """The innermost session around this call, or that of this thread's calls outside of all."""
    return current_session() or _HERE.session
