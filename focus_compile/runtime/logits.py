"""Which output of a program are the logits, and what they say of the tokens of a call."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from focus_compile.config import FocusConfig
from focus_compile.log import warning_once
from focus_compile.ops.likelihood import most_probable
from focus_compile.programs.halves import Halves
from focus_compile.programs.layout import Layout
from focus_compile.runtime.outputs import Packed, packed_logits
from focus_compile.runtime.predictions import Predictions, Reading, on_canvas
from focus_compile.runtime.reader import Outputs, outermost
from focus_compile.runtime.session import Session

__all__ = ["Logits", "is_shifted", "reading_of"]

log = logging.getLogger(__name__)

NOT_PACKED = (
    "session(logits='packed') leaves logits on the canvas, and session.logits is None: this "
    "program's outputs are not known to be what the model returns as logits. Compile the outermost "
    "module, and remove graph breaks; or read the model's output at session.retain_mask"
)


def is_shifted(config: FocusConfig, session: Session) -> bool:
    """Whether the token at p is predicted by the logits of p - 1.

    A generation knows it; a loop of one's own says it of its session, or of its model.
    """
    return session.shifted_logits or (session.reader is None and config.shifted_logits)


def reading_of(config: FocusConfig, session: Session) -> Reading:
    """How a call in a session is read."""
    option, shifted = config.mask_token_id, is_shifted(config, session)
    token = option if session.mask_token_id is None else session.mask_token_id
    model = None if session.reader is None else session.reader.model
    before = None
    if shifted and session.last is not None:
        before = most_probable(session.last, token)
    return Reading(model, token, shifted, before)


class Logits:
    """The logits among a program's outputs; ``read_as``: models of which it is known."""

    def __init__(self, halves: Halves, read_as: Outputs) -> None:
        self.halves = halves
        self.read_as = read_as

    def at(self, reading: Reading) -> int | None:
        """Which output the caller reads as logits, if that is known."""
        seen = None if reading.model is None else self.read_as.get(reading.model)
        if seen is None and len(self.halves.vocabulary) == 1:
            return self.halves.vocabulary[0]
        return seen

    def packed(self, session: Session, *, returns: bool) -> int | None:
        """Which output stays packed: one that is known to be what the caller reads as logits.

        ``returns``: the function that was captured returns behind this graph.
        """
        if not session.packed:
            return None
        if self.halves.logits is None:
            raise ValueError("logits='packed': the model returns no value with a row per token")
        if session.reader is not None:
            return self.read_as.get(session.reader.model)
        if len(self.halves.vocabulary) == 1 and returns and outermost():
            return self.halves.vocabulary[0]
        session.logits = None
        warning_once(log, NOT_PACKED)
        return None

    def predictions(
        self,
        values: Mapping[str, Tensor],
        shape: torch.Size,
        retained: Packed,
        reading: Reading,
    ) -> Predictions | None:
        """What each retained token could be decoded to; None: no output is known to be logits."""
        at = self.at(reading)
        logits = None if at is None else self.halves.own[at]
        if logits is None:
            return None
        packed = packed_logits(logits, values, retained)
        found = most_probable(packed.values, reading.excluded)
        return on_canvas(shape, retained.tokens, found, reading)

    def dense_predictions(
        self,
        dense: Callable[..., Any],
        layout: Layout,
        args: Sequence[Any],
        shape: torch.Size,
        reading: Reading,
    ) -> Predictions | None:
        """What the dense program could decode each token to; the call leaves no trace.

        None: no output is known to be the logits of every token.
        """
        at = self.at(reading)
        logits = None if at is None else self.halves.own[at]
        if at is None or logits is None or logits.batch_dim is None or logits.last is not None:
            return None
        written = {a.position for a in (*layout.written, *(held.argument for held in layout.held))}
        copies = [arg.clone() if index in written else arg for index, arg in enumerate(args)]
        canvas: Tensor = dense(*copies)[at]
        rows = canvas.movedim((logits.batch_dim, logits.token_dim), (0, 1))
        where = torch.arange(shape.numel(), device=rows.device)
        found = most_probable(rows.flatten(0, 1).flatten(1), reading.excluded)
        return on_canvas(shape, where, found, reading)
