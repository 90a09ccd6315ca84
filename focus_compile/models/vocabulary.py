"""Token ids against the rows of a model's embedding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from focus_compile.models.compiled import original

__all__ = ["check_ids", "check_mask_token", "rows_of"]


def rows_of(model: nn.Module) -> int | None:
    """Rows of the embedding of a transformers model, compiled or not; None of any other."""
    inner: Any = original(model)
    table = inner.get_input_embeddings() if isinstance(inner, PreTrainedModel) else None
    return table.num_embeddings if isinstance(table, nn.Embedding) else None


def check_mask_token(token: int, rows: int | None) -> None:
    """Compare an id with the rows of an embedding, where they are known.

    Raises:
        ValueError: no row belongs to it.
    """
    if rows is not None and token >= rows:
        raise ValueError(
            f"mask_token_id={token}: the model's embedding has {rows} rows. Give the id of this "
            "model's own mask token: tokenizer.mask_token_id, or see its model card"
        )


def check_ids(ids: Tensor, rows: int | None) -> None:
    """Likewise the ids of prompts.

    Raises:
        ValueError: no row belongs to one of them.
    """
    if rows is None:
        return
    low, high = (int(bound) for bound in torch.aminmax(ids))
    if low < 0 or high >= rows:
        outside = high if low >= 0 else low
        raise ValueError(
            f"input_ids holds {outside}: the model has {rows} tokens: use its tokenizer"
        )
