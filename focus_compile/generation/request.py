"""The arguments of a generation, checked and brought into one form.

Numbers and ids may be Python's, NumPy's or tensors of one element, ids also lists of them.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteriaList

__all__ = [
    "criteria",
    "fraction",
    "lengths",
    "prompts",
    "token_id",
    "token_ids",
    "whole",
]


def whole(name: str, value: Any, least: int = 1) -> int:
    """A whole number.

    Raises:
        ValueError: it is none, or less than ``least``.
    """
    number = _index(value)
    if number is None or number < least:
        raise ValueError(f"{name}={value!r}: expected a whole number from {least} on")
    return number


def lengths(new: Any, block: Any) -> tuple[int, int]:
    """``max_new_tokens`` and ``block_length``.

    Raises:
        ValueError: one is less than 1, or no whole number.
    """
    tokens, size = _index(new), _index(block)
    if tokens is None or size is None or min(tokens, size) < 1:
        raise ValueError(f"max_new_tokens={new}, block_length={block}: expected at least 1")
    return tokens, size


def fraction(name: str, value: Any) -> float:
    """A number.

    Raises:
        ValueError: it is none.
    """
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}={value!r}: expected a number") from error


def token_ids(name: str, value: Any) -> list[int]:
    """Ids of tokens, given as one, as several, or as None; negative ones stand for none.

    Raises:
        ValueError: the value is something else.
    """
    if value is None:
        return []
    number = _index(value)
    if number is not None:
        numbers: list[int | None] = [number]
    elif isinstance(value, Iterable) and not isinstance(value, str | bytes | dict):
        numbers = [_index(each) for each in value]
    else:
        numbers = [None]
    ids = [each for each in numbers if each is not None]
    if len(ids) < len(numbers):
        raise ValueError(f"{name}={value!r}: expected an id or a list of ids")
    return [each for each in ids if each >= 0]


def token_id(name: str, value: Any) -> int:
    """One id.

    Raises:
        ValueError: none or several are given.
    """
    ids = token_ids(name, value)
    if len(ids) != 1:
        raise ValueError(f"{name}={value!r}: expected one id")
    return ids[0]


def prompts(ids: Any, valid: Any) -> tuple[Tensor, Tensor]:
    """Token ids int64 and their mask, ``[B, P]``.

    Raises:
        ValueError: they have other shapes or hold no ids, or padding is not on the left.
    """
    ids = _tensor("input_ids", ids)
    if ids.dim() != 2 or ids.shape[0] == 0 or ids.shape[1] == 0:
        raise ValueError(
            f"input_ids has shape {tuple(ids.shape)}: expected [batch, prompt], not empty"
        )
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"input_ids has dtype {ids.dtype}: expected ids, torch.int64")
    valid = torch.ones_like(ids) if valid is None else _tensor("attention_mask", valid)
    valid = valid.to(ids.device)
    if valid.shape != ids.shape:
        raise ValueError(
            f"attention_mask has shape {tuple(valid.shape)}: input_ids has {tuple(ids.shape)}"
        )
    if not bool(valid[:, -1].all()):
        raise ValueError("attention_mask ends with 0: expected prompts padded on the left")
    return ids.long(), valid


def criteria(given: Any) -> StoppingCriteriaList:
    """Stopping criteria, given as a list, as one, or as None.

    Raises:
        ValueError: one of them is no function.
    """
    several = given if isinstance(given, list | tuple) else [] if given is None else [given]
    if not all(callable(each) for each in several):
        raise ValueError(f"stopping_criteria={given!r}: expected functions of (ids, scores)")
    return StoppingCriteriaList(several)


def _index(value: Any) -> int | None:
    """A whole number of any kind that Python can count with, no bool."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except (TypeError, ValueError, RuntimeError):
        return None


def _tensor(name: str, value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name}: expected a tensor [batch, prompt], got {error}") from error
