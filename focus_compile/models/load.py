"""The command line's PATH: a model's folder, the id of one on the Hugging Face hub, or
``module:function``; and a call to look at.

A function returns a model, or a model and the keyword arguments of a denoising call. Python files
that come with a model are run only where the user says so: ``--trust-remote-code``.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    PreTrainedTokenizerBase,
)

from focus_compile.models.mask_token import find_mask_token
from focus_compile.models.masks import attention_mask, cache_keyword
from focus_compile.models.stored import check_files

__all__ = ["BadInput", "denoising_call", "load", "mask_token", "tokenizer"]


_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
"""``owner/name``, as models on the hub are called."""


class BadInput(Exception):
    """What the user gave is no model, or lacks something; one line that says what."""


def load(path: str, trust_remote_code: bool = False) -> tuple[Any, dict[str, Any] | None]:
    """The model of a PATH, and the call that comes with it, if any.

    Raises:
        BadInput: there is none.
    """
    if _is_stored(path):
        try:
            return _stored_model(path, trust_remote_code).eval(), None
        except (ValueError, OSError, ImportError) as error:
            raise BadInput(f"{_one_line(path, error)}{_trust_hint(error)}") from error
    module, colon, function = path.partition(":")
    if not colon:
        raise BadInput(
            f"no such folder: {path}; give a model's folder, the id of one on the hub "
            "(owner/name), or module:function"
        )
    try:
        factory = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise BadInput(f"{path}: {error}") from error
    if not callable(factory) or _needs_arguments(factory):
        raise BadInput(f"{path} is no function that can be called without arguments")
    returned = factory()
    model, call = returned if isinstance(returned, tuple) else (returned, None)
    if not isinstance(model, nn.Module):
        raise BadInput(f"{path} returned a {type(model).__name__}, not a torch.nn.Module")
    return model.eval(), call


def tokenizer(path: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer that comes with a model.

    Raises:
        BadInput: there is none.
    """
    if not _is_stored(path):
        raise BadInput(f"no tokenizer: {path} is not a folder, nor the id of a model on the hub")
    try:
        loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            path, trust_remote_code=trust_remote_code
        )
    except (ValueError, OSError, ImportError) as error:
        raise BadInput(f"{_one_line(path, error)}{_trust_hint(error)}") from error
    return loaded


def _is_stored(path: str) -> bool:
    """Whether a PATH is a model's folder, or looks like the id of one on the hub.

    Raises:
        BadInput: it is a folder without a model, or with a damaged one.
    """
    folder = Path(path)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise BadInput(f"{path} is not a model: it has no config.json")
        try:
            check_files(folder)
        except ValueError as error:
            raise BadInput(str(error)) from error
        return True
    return _HUB.fullmatch(path) is not None and not folder.parent.is_dir()


def _stored_model(path: str, trust_remote_code: bool = False) -> Any:
    """A model as its config says; some name an ``AutoModel`` only, such as Dream."""
    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    auto_map: dict[str, str] = getattr(config, "auto_map", None) or {}
    base_only = "AutoModel" in auto_map and "AutoModelForCausalLM" not in auto_map
    loader: Any = AutoModel if base_only else AutoModelForCausalLM
    return loader.from_pretrained(path, trust_remote_code=trust_remote_code)


def _trust_hint(error: Exception) -> str:
    """What to add where transformers asks for the trust that only the user can give."""
    if "trust_remote_code" not in str(error):
        return ""
    return "; on this command line: --trust-remote-code (docs/security.md)"


def mask_token(
    model: Any, tokenizer: PreTrainedTokenizerBase | None, mask_token_id: int | None
) -> int:
    """The id of the mask token: the one that is given, or looked up.

    Raises:
        BadInput: nothing tells.
    """
    if mask_token_id is not None:
        return mask_token_id
    try:
        return find_mask_token(model, tokenizer)
    except ValueError as error:
        raise BadInput(str(error).replace("mask_token_id=...", "--mask-token-id")) from error


def denoising_call(
    model: Any, batch: int, block: int, history: int, mask_token_id: int | None = None
) -> dict[str, Any]:
    """Arguments of a denoising call: a block, every token visible, and a cache.

    Ids are zeros, or, with ``mask_token_id``, random with two thirds of masks.

    Raises:
        BadInput: the model has no config that tells its sizes.
    """
    if getattr(model, "config", None) is None:
        raise BadInput(
            f"{type(model).__name__} has no config: let the function return the model and the "
            "keyword arguments of a denoising call"
        )
    ids = torch.zeros(batch, block, dtype=torch.int64)
    if mask_token_id is not None:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, model.config.vocab_size, ids.shape, generator=generator)
        masked = torch.rand(ids.shape, generator=generator) < 2 / 3
        masked[:, block // 2] = True
        ids = ids.masked_fill(masked, mask_token_id)
    visible = torch.ones(batch, 1, block, history + block, dtype=torch.bool)
    arguments: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": attention_mask(model, visible),
    }
    if history:
        arguments |= {cache_keyword(model): _cache(model, batch, history), "use_cache": True}
    return arguments


def _cache(model: Any, batch: int, history: int) -> DynamicCache:
    """Random keys and values in the shapes that a model's config tells."""
    config = model.config
    cache = DynamicCache(config=config)
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    shape = (batch, getattr(config, "num_key_value_heads", None) or heads, history, size)
    dtype = next(model.parameters()).dtype
    generator = torch.Generator().manual_seed(0)
    for layer in range(config.num_hidden_layers):
        keys, values = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
        cache.update(keys, values, layer)
    return cache


def _needs_arguments(function: Callable[..., Any]) -> bool:
    try:
        inspect.signature(function).bind()
    except TypeError:
        return True
    except ValueError:  # a builtin that does not tell
        return False
    return False


def _one_line(path: str, error: Exception) -> str:
    """One line that names the path."""
    line = " ".join(str(error).split())
    return line if line.startswith(path) else f"{path}: {line}"
