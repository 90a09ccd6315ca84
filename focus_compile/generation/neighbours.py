"""A check that a row's answer does not depend on its neighbours."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from focus_compile.models.masks import canvas_arguments, own_arguments
from focus_compile.rounding import TOLERANCE
from focus_compile.runtime.session import session

__all__ = ["refuse_neighbours"]


def refuse_neighbours(model: nn.Module, ids: Tensor, seen: Tensor) -> None:
    """Try a few tokens of the row with most padding: alone, and beside padding of two kinds.

    A mask may be ignored in silence (LLaDA's first public file passes none to its attention), and
    a model without position ids may count padding.
    """
    row = int(seen.sum(1).argmin())
    padding = int((~seen[row]).sum())
    few = slice(max(0, padding - 4), padding + 8)
    ids, seen = ids[row : row + 1, few], seen[row : row + 1, few]
    first = int((~seen).sum())
    other = torch.where(seen, ids, ids[:, first : first + 1])

    def logits(of: Tensor, seen: Tensor) -> Tensor:
        made: Tensor = (
            own_arguments(model).forward(input_ids=of, **canvas_arguments(model, seen)).logits
        )
        return made[0, -(ids.shape[1] - first) :].float()

    with session(enabled=False):
        alone = logits(ids[:, first:], seen[:, first:])
        padded, otherwise = logits(ids, seen), logits(other, seen)
    dtype = next(model.parameters()).dtype
    largest = max(1.0, alone.abs().max().item())
    content = (padded - otherwise).abs().max().item() / largest
    presence = (padded - alone).abs().max().item() / largest
    if not (content <= 4 * torch.finfo(dtype).eps and presence <= 4 * TOLERANCE[dtype]):
        raise ValueError(
            "generate(use_cache=False) with padded prompts: the model sees their padding, so that "
            f"a row's answer would depend on its neighbours (logits move by {presence:.1g} of the "
            "largest): give prompts of one length at a time"
        )
