"""Sessions: the scope of one generation."""

from __future__ import annotations

from contextvars import ContextVar

from torch import Tensor

__all__ = ["Session", "current_session"]


class Session:
    """stub"""

    def __init__(self, mask_token_id: int | None = None) -> None:
        self.mask_token_id = mask_token_id
        self.masked: Tensor | None = None
        self.retain_mask: Tensor | None = None

    def take_masked(self, ids: Tensor) -> Tensor | None:
        masked, self.masked = self.masked, None
        return masked


_CURRENT: ContextVar[Session | None] = ContextVar("focus_session", default=None)


def current_session() -> Session | None:
    """The innermost session of this thread or task."""
    return _CURRENT.get()
