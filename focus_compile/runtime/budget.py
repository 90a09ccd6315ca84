"""How many masked tokens of each row are retained, and which in any case.

docs/algorithm.md sections 2, 10 and 15.
"""

from __future__ import annotations

import torch
from torch import Tensor

from focus_compile.config import FocusConfig
from focus_compile.runtime.block import BlockState
from focus_compile.runtime.logits import is_shifted
from focus_compile.runtime.session import Session

__all__ = ["budget", "required"]


def required(config: FocusConfig, session: Session, state: BlockState) -> Tensor | None:
    """Masked tokens that are not to be evicted, bool ``[B, T]``, or None: any may be.

    Those that the caller names. In a thread's implicit session, of which no loop has said how it
    decodes, also those behind what the row's loop has been seen to decode.
    """
    named = session.required(state.masked)
    if not session.implicit or _first_step(config, session) == "evict":
        return named
    beyond = state.beyond(is_shifted(config, session))
    return beyond if named is None else named | beyond


def budget(
    config: FocusConfig,
    session: Session,
    state: BlockState,
    alpha: Tensor,
    needed: Tensor | None,
) -> Tensor:
    """The average by which ``alpha``, an fp32 scalar, gives each row its budget, fp32 ``[B]``.

    In a first step that is open, of an infinite average. ``needed`` tokens, bool ``[B, T]``, come
    on top of the budget.
    """
    average, first_step = state.average, _first_step(config, session)
    least = session.tokens_per_step or config.tokens_per_step
    if least is not None or needed is not None:
        whole = (average.clamp_min(1.0) * alpha).ceil().clamp_min(least or 1)
        if needed is not None:
            whole = whole + needed.sum(1)
        # section 2 rounds it up to the whole; an infinite alpha needs no help
        average = torch.where(alpha.isinf(), average, (whole - 0.5) / alpha)
    if first_step != "evict":
        opening = ~state.warm
        if first_step == "auto":
            opening = opening & state.opens(alpha.ceil())
        average = torch.where(opening, torch.inf, average)
    return average


def _first_step(config: FocusConfig, session: Session) -> str:
    return session.first_step or config.first_step
