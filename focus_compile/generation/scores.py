"""The logits that a denoising step decodes: what the model returned, where it was computed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from focus_compile.log import warning_once
from focus_compile.runtime.controls import is_exact
from focus_compile.runtime.reader import MaskedCall, Reader
from focus_compile.runtime.session import PackedLogits, Session
from focus_compile.runtime.statistics import SessionStats

__all__ = ["Scores", "step_scores"]

log = logging.getLogger(__name__)

NO_LOGITS = "the compiled program returns hidden states, no logits: a part of the model is compiled"
CHANGED = "the model's logits are not the tensor that the compiled program returned"
ON_CANVAS = (
    "generate() reads logits from what the model returned, spread over all tokens of the block, "
    "not packed: %s. Compile the outermost module, torch.compile(model, backend='focus'), to "
    "compute a large vocabulary for the retained tokens alone"
)
PARTS = (
    "generate() runs the dense program: %d masked calls of compiled programs made one forward of "
    "the model, and each evicts tokens of its own. Compile the outermost module, "
    "torch.compile(model, backend='focus'), so that it is one"
)


@dataclass(frozen=True)
class Scores:
    """Logits ``values`` ``[M, V]``; ``row`` int64 ``[B, T]``: where each token's are, or -1.

    ``retained``: bool ``[B, T]`` of FOCUS's call, or None where the dense program ran.
    """

    values: Tensor
    row: Tensor
    retained: Tensor | None = None

    def shifted(self, last: Tensor | None) -> Scores:
        """Those of each token's left neighbour; ``last`` ``[B, V]``: of the token before."""
        edge, values = torch.full_like(self.row[:, :1], -1), self.values
        if last is not None:
            edge[:, 0] = len(values) + torch.arange(len(last), device=edge.device)
            values = torch.cat([values, last])
        return Scores(values, torch.cat([edge, self.row[:, :-1]], 1), self.retained)


def step_scores(
    forward: Callable[[], Tensor], masked: Tensor, focus: Session, reader: Reader
) -> Scores:
    """Run a masked call, again where it turns out that its logits must not be packed.

    The first call of a program runs unpacked. It stays packed from then on where the model returned
    the program's own tensor, which every later call checks anew.

    Args:
        forward: returns the model's logits ``[B, T, V]``; masked: bool ``[B, T]``, some are.

    Raises:
        ValueError: the model returned logits of other tokens, or mixes those of different tokens.
    """
    focus.reader = reader
    while True:
        reader.calls.clear()
        focus.masked, focus.any_masked, focus.logits = masked, True, None
        canvas = forward()
        calls = list(reader.calls)
        reader.calls.clear()
        if canvas.shape[:2] != masked.shape:
            shape = tuple(canvas.shape)
            raise ValueError(
                f"the model returned logits of shape {shape} for {tuple(masked.shape)} tokens: "
                "expected one row per token"
            )
        if not calls:
            return _on_canvas(canvas, None)
        if len(calls) == 1 and (at := calls[0].output_of(canvas)) is not None:
            (call,) = calls
            call.program.read_as.set(reader.model, at)
            if call.packed == at:
                assert focus.logits is not None
                return _packed(focus.logits, call.retained)
            if call.packed is None:
                return _on_canvas(canvas, call.retained)
        if _unpack(calls, reader):
            continue
        exact = all(is_exact(call.program.config, focus) for call in calls)
        if (len(calls) == 1 or exact) and all(bool(call.retained.all()) for call in calls):
            return _on_canvas(canvas, calls[0].retained)
        if len(calls) > 1:
            warning_once(log, PARTS, len(calls))
            focus.enabled, focus.stats = False, SessionStats()
            continue
        (call,) = calls
        warning_once(log, ON_CANVAS, CHANGED if call.program.returns_logits else NO_LOGITS)
        if not reader.checked:
            _check_rows(canvas, call.retained, masked)
            reader.checked = int((~call.retained).sum()) > 1
        return _on_canvas(canvas, call.retained)


def _unpack(calls: list[MaskedCall], reader: Reader) -> bool:
    """Take back what was known of programs that left logits packed which the model changed."""
    packed = [call for call in calls if call.packed is not None]
    for call in packed:
        call.program.read_as.forget(reader.model)
    return bool(packed)


def _on_canvas(canvas: Tensor, retained: Tensor | None) -> Scores:
    row = torch.arange(canvas[..., 0].numel(), device=canvas.device).view(canvas.shape[:2])
    if retained is not None:
        row = torch.where(retained, row, -1)
    return Scores(canvas.flatten(0, 1), row, retained)


def _packed(logits: PackedLogits, retained: Tensor) -> Scores:
    row = torch.full(retained.shape, -1, device=retained.device)
    count = len(logits.values)
    row[logits.rows, logits.positions] = torch.arange(count, device=retained.device)
    return Scores(logits.values, row, retained)


def _check_rows(canvas: Tensor, retained: Tensor, masked: Tensor) -> None:
    """What follows the program must treat tokens one by one.

    Then the rows of evicted tokens, all zero to it, are still alike, and no other row is like them.

    Raises:
        ValueError: it mixes or moves them.
    """
    blank = canvas[~retained].float().nan_to_num()
    read = canvas[retained & masked].float().nan_to_num()
    near = 1e-2 * max(float(blank.abs().amax()), float(read.abs().amax()))
    apart = float((blank - blank[0]).abs().amax()) > near
    if apart or bool((read == blank[0]).all(1).any()) or bool((read == read[:, :1]).all(1).any()):
        raise ValueError(
            "the model moves or mixes the logits of tokens after its compiled program, which "
            "computed some of them only: compile the outermost module, torch.compile(model, "
            "backend='focus'), or, where it shifts them by one, leave that to "
            "generate(shifted_logits=True)"
        )
