"""Attention masks as models take them: every token of a call sees all that is no padding."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn

from focus_compile.models.compiled import original

__all__ = [
    "attention_mask",
    "block_mask",
    "cache_keyword",
    "canvas_arguments",
    "forward_arguments",
    "own_arguments",
]


def own_arguments(model: nn.Module) -> nn.Module:
    """A model as it was before it was compiled."""
    return original(model)


def forward_arguments(model: nn.Module) -> tuple[set[str], bool]:
    """Names of the arguments of a model's forward, and whether it takes any others too."""
    parameters = inspect.signature(own_arguments(model).forward).parameters
    return set(parameters), any(
        parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()
    )


def _additive(visible: Tensor, model: nn.Module) -> Tensor:
    """0 where visible, the lowest number of the model's dtype elsewhere."""
    dtype = next(model.parameters()).dtype
    zeros = torch.zeros_like(visible, dtype=dtype)
    return zeros.masked_fill(~visible, torch.finfo(dtype).min)


def attention_mask(model: nn.Module, visible: Tensor) -> Tensor:
    """A bool mask in the form that a model takes.

    transformers' eager attention adds its mask to the scores: a bool one would add 1.
    """
    config = getattr(own_arguments(model), "config", None)  # modules of other makers may have none
    eager = getattr(config, "_attn_implementation", None) == "eager"
    return _additive(visible, model) if eager else visible


def block_mask(model: nn.Module, valid: Tensor, tokens: int | None = None) -> Tensor:
    """The attention mask of one call of a diffusion LLM, from the 2-D mask of a tokenizer.

    Every token of the call sees every valid key, on its left and on its right; transformers'
    models make a *causal* mask of a 2-D mask, and of None.

    ::

        mask = block_mask(model, torch.cat([prompt_mask, ones], 1), block_length)
        out = compiled(input_ids=block, attention_mask=mask, past_key_values=cache)

    Args:
        model: tells the form of the mask; compiled or not.
        valid: ``[B, S + T]``, 0 (or False) at padding, of history and tokens of the call together.
        tokens: T, those that the call is given, the last ones; None: all of them (a prompt to be
            stored in an empty cache, or the canvas of a model without a cache).

    Returns:
        ``[B, 1, T, S + T]``: bool, True where visible; or additive, in the model's dtype, where
        the model's attention is transformers' ``"eager"``.

    Raises:
        ValueError: ``valid`` has another rank, or holds fewer than ``tokens`` tokens.
    """
    length = valid.shape[-1] if tokens is None else tokens
    if valid.dim() != 2 or not 1 <= length <= valid.shape[1]:
        raise ValueError(
            f"valid has shape {tuple(valid.shape)}: expected [batch, history + tokens], with "
            f"tokens={tokens} or more columns"
        )
    visible = valid.bool()[:, None, None, :].expand(-1, 1, length, -1).contiguous()
    return attention_mask(model, visible)


def canvas_arguments(model: nn.Module, valid: Tensor) -> dict[str, Tensor]:
    """What a model gets beside the ids of a canvas; ``valid`` bool ``[B, L]``: no padding.

    By the names of its forward's arguments, whether or not a row is padded: what a row gets never
    depends on its neighbours. ``attention_bias`` (LLaDA, whose 2-D ``attention_mask`` would break
    the graph): an additive mask ``[B, 1, L, L]``. Else ``attention_mask`` (transformers' models,
    whose own mask would be causal; Dream): the mask of :func:`block_mask`. ``position_ids``:
    counted from the first token that is no padding. A model that has none of them gets ids alone.
    """
    names, takes_any = forward_arguments(model)
    arguments: dict[str, Tensor] = {}
    if "attention_bias" in names:
        visible = valid[:, None, None, :].expand(-1, 1, valid.shape[1], -1)
        arguments["attention_bias"] = _additive(visible.contiguous(), model)
    elif takes_any or "attention_mask" in names:
        arguments["attention_mask"] = block_mask(model, valid)
    if takes_any or "position_ids" in names:
        arguments["position_ids"] = (valid.long().cumsum(1) - 1).clamp_min(0)
    return arguments


def cache_keyword(model: nn.Module) -> str:
    """What a model calls the argument for its K/V cache: transformers 5.24 renamed it."""
    return "cache" if "cache" in forward_arguments(model)[0] else "past_key_values"
