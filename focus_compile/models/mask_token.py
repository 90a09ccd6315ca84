"""Which id a model's mask token has."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["FAMILIES", "find_mask_token", "predicts_next"]

log = logging.getLogger(__name__)

FAMILIES = {"llada2": 156895, "llada": 126336, "sdar": 151669, "dream": 151666}
"""Ids of the mask token that the public checkpoints of a family use."""

MODEL_TYPES = {
    "llada2_moe": ("llada2", "LLaDA2MoeModelLM"),
    "llada": ("llada", "LLaDAModelLM"),
    "sdar": ("sdar", "SDARForCausalLM"),
    "sdar_moe": ("sdar", "SDARMoeForCausalLM"),
    "dream": ("dream", "DreamModel"),
}
"""model_type -> family, and its architecture: other models borrow these types, or begin alike.

LLaDA-MoE is of type "llada", too, and its mask token is not LLaDA's.
"""


def find_mask_token(model: nn.Module, tokenizer: PreTrainedTokenizerBase | None = None) -> int:
    """The id of a model's mask token; see :func:`compile`.

    Raises:
        ValueError: neither tokenizer, config nor family tells.
    """
    config: Any = getattr(model, "config", None)
    model_type = str(getattr(config, "model_type", "")).lower()
    sources = {
        "the tokenizer": getattr(tokenizer, "mask_token_id", None),
        "model.config": getattr(config, "mask_token_id", None),
    }
    for source, token in sources.items():
        if token is not None:
            log.info("mask_token_id=%d, from %s", token, source)
            return int(token)
    family, architecture = MODEL_TYPES.get(model_type, (None, ""))
    architectures: list[str] = getattr(config, "architectures", None) or []
    if not architectures:  # a config made by hand
        is_transformers = isinstance(model, PreTrainedModel)
        architectures = [type(model).__name__] if is_transformers else [architecture]
    if family is not None and list(architectures) == [architecture]:
        token = FAMILIES[family]
        log.warning("mask_token_id=%d, guessed: the family %r uses it", token, family)
        return token
    raise ValueError(
        "no mask token: neither the tokenizer nor model.config names one, and model_type "
        f"{model_type!r} of {', '.join(map(str, architectures)) or 'no architecture'} is no family "
        f"that we know ({', '.join(FAMILIES)}); give mask_token_id=..., see the model's card"
    )


def predicts_next(model: Any) -> bool:
    """Whether a model is of a family that predicts the token at p by the logits of p - 1: Dream."""
    config = getattr(model, "config", None)
    return str(getattr(config, "model_type", "")).lower() == "dream"
