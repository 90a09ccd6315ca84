"""A captured graph that FOCUS leaves as it is: refused, or a call of a single token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from focus_compile.capture.modes import refuse_modes
from focus_compile.errors import Unsupported
from focus_compile.runtime.holes import refuse_any
from focus_compile.runtime.identity import model_key
from focus_compile.runtime.implicit import session_here

__all__ = ["Unchanged"]


class Unchanged:
    """The dense program alone; to a session its calls are what mask-free ones are.

    They end every block of the model, and take the masks that were given for them.
    """

    def __init__(self, dense: Callable[..., Any]) -> None:
        self.dense = dense

    def __call__(self, *args: Any) -> Any:
        session = session_here()
        with session.calling():
            key = model_key(args)
            if session.changes_threads(key):
                _check_modes(args)
            session.masked = None
            refuse_any(args)
            session.end_blocks(key)
            return self.dense(*args)


def _check_modes(args: Sequence[Any]) -> None:
    """In mid-block, in another thread: whether this call is dense for the modes of that one."""
    try:
        refuse_modes(args)
    except Unsupported as refusal:
        raise RuntimeError(
            f"a session is in mid-block, and in this call {refusal.reason}. Such modes are per "
            "thread: every thread that makes calls of the session sets its own"
        ) from refusal
