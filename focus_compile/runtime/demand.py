"""Which rows need their evicted tokens: those in which nothing that was retained is sure.

docs/algorithm.md section 11, items 1 and 2.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from focus_compile.config import Rescue, is_rescue

__all__ = ["Demand", "check_rescue", "demand_of", "in_need", "rescue_of"]


@dataclass(frozen=True)
class Demand:
    """What a row must have retained to do without its evicted tokens.

    Attributes:
        threshold: probability in [0, 1] that a retained masked token must reach.
        strategy: ``"threshold"``: one token; ``"fixed"``: ``count`` tokens; ``"sequential"``: the
            ``count`` leftmost masks must be among those that can be decoded, however sure.
    """

    threshold: float
    strategy: str = "threshold"
    count: int = 1


def check_rescue(rescue: Any) -> Rescue:
    """What a session or a generation takes: a probability, ``"auto"`` or None.

    Raises:
        ValueError: it is none of them.
    """
    if is_rescue(rescue):
        return rescue  # type: ignore[no-any-return]
    raise ValueError(f"rescue={rescue!r}: expected a probability from 0 to 1, 'auto' or None")


def demand_of(option: Rescue, session: Rescue, decoding: Demand | None) -> Demand | None:
    """What rows must have retained; None: nobody is rescued.

    The session's setting, else the model's option, else how ``generate`` decodes, ``decoding``, if
    it is by a threshold; None: a loop of one's own, or a function, whose threshold is not known.
    """
    asked = option if session == "auto" else session
    if asked == "auto":
        by_threshold = decoding is not None and decoding.strategy == "threshold"
        return decoding if by_threshold else None
    if asked is None:
        return None
    return Demand(asked) if decoding is None else replace(decoding, threshold=asked)


def in_need(sure: Tensor, masked: Tensor, retained: Tensor, demand: Demand) -> Tensor:
    """Rows whose evicted tokens are to be computed, bool ``[B]``.

    Args:
        sure: fp32 ``[B, T]``, the confidence with which each position could be decoded now, -1
            where it cannot: where its logits were not computed.
        masked, retained: bool ``[B, T]``, as fed and as selected.
    """
    evicted = (masked & ~retained).any(1)
    able = sure.isnan() | (sure >= 0)
    if demand.strategy == "sequential":
        return evicted & (masked & (masked.cumsum(1) <= demand.count) & ~able).any(1)
    count = 1 if demand.strategy == "threshold" else demand.count
    if count > masked.shape[1]:
        return evicted
    candidates = torch.where(masked, sure, -1.0)
    last = candidates.sort(1, descending=True).values[:, count - 1]
    return evicted & (candidates.isnan().any(1) | ~(last >= demand.threshold))


def rescue_of(
    sure: Tensor | None, masked: Tensor, retained: Tensor, demand: Demand
) -> Tensor | None:
    """Evicted tokens of the rows in need, bool ``[B, T]``; None where there is none.

    ``sure``: as for :func:`in_need`, or None: not known, and nobody is rescued.
    """
    if sure is None:
        return None
    need = in_need(sure, masked, retained, demand)
    rescued = masked & ~retained & need.unsqueeze(1)
    return rescued if bool(rescued.any()) else None
