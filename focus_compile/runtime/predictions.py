"""What positions could be decoded to, as far as their logits are known."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["Predictions", "Reading", "on_canvas"]


@dataclass(frozen=True)
class Predictions:
    """The token that each position could be decoded to, int64 ``[B, T]``, and its confidence, fp32.

    A confidence of -1: its logits were not computed.
    """

    confidence: Tensor
    tokens: Tensor = field(repr=False)


@dataclass(frozen=True)
class Reading:
    """How a call's logits are read.

    Attributes:
        model: who returns them, of several that a program is a part of; None: an own loop's.
        excluded: the mask token, which nothing is decoded to.
        shifted: the token at p is predicted by the row of p - 1; before: with it, confidence and
            token, ``[B]`` each, by the row in front of the block; None: there is none.
    """

    model: object = None
    excluded: int | None = None
    shifted: bool = False
    before: tuple[Tensor, Tensor] | None = None


def on_canvas(
    shape: torch.Size, where: Tensor, found: tuple[Tensor, Tensor], reading: Reading
) -> Predictions:
    """Confidences and tokens of some rows of logits, on the canvas.

    Args:
        where: int64 ``[N]``, flat positions of the rows; found: their confidences and tokens.
    """
    confidence = torch.full(shape, -1.0, device=where.device)
    tokens = torch.zeros(shape, dtype=torch.int64, device=where.device)
    confidence.view(-1)[where], tokens.view(-1)[where] = found
    if not reading.shifted:
        return Predictions(confidence, tokens)
    before = reading.before
    if before is None:
        before = torch.full_like(confidence[:, 0], -1.0), torch.zeros_like(tokens[:, 0])
    return Predictions(
        torch.cat([before[0].unsqueeze(1), confidence[:, :-1]], 1),
        torch.cat([before[1].unsqueeze(1), tokens[:, :-1]], 1),
    )
