"""Texts in, texts out: how prompts become tokens, what ends an answer, and its text.

The command line, the evaluations and the examples all ask here, so that they agree.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from focus_compile.generation.request import token_ids

__all__ = ["StopStrings", "answers", "end_tokens", "left_padded", "prompt_ids"]


def end_tokens(tokenizer: PreTrainedTokenizerBase, model: nn.Module) -> list[int]:
    """Ids that end a text: the tokenizer's, and those of the model's generation_config.

    Chat models list several there. Where there is none, the model's config tells.
    """
    given: Any = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if given is None:
        given = getattr(getattr(model, "config", None), "eos_token_id", None)
    own = token_ids("eos_token_id", tokenizer.eos_token_id)
    return list(dict.fromkeys([*own, *token_ids("eos_token_id", given)]))


def prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """A prompt's tokens, with what the tokenizer puts before a text, but never twice.

    A chat template may have written it already. An empty prompt begins with the beginning of a
    text, or with an end of one.

    Raises:
        ValueError: the text is no Unicode, or it is empty and there is no such token.
    """
    text.encode()  # a surrogate alone, which JSON can hold, is no text
    whole: list[int] = tokenizer(text)["input_ids"]
    plain: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    for count in range(len(whole) - len(plain), 0, -1):
        before, rest = whole[:count], whole[count:]
        if rest[: len(plain)] == plain and plain[:count] == before:
            return rest
    first = tokenizer.bos_token_id
    first = tokenizer.eos_token_id if first is None else first
    if not whole and first is None:
        raise ValueError("an empty prompt: this tokenizer has no token that begins a text")
    return whole or [int(first)]


def left_padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Ids and attention mask int64 ``[B, P]``; needs no padding token, for nobody sees it."""
    longest = max(map(len, rows))
    ids = [[0] * (longest - len(row)) + list(row) for row in rows]
    real = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids), torch.tensor(real)


class StopStrings:
    """Strings that end an answer, the texts of special tokens among them.

    Raises:
        ValueError: the tokenizer is missing.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase | None, strings: str | Sequence[str]
    ) -> None:
        if tokenizer is None:
            raise ValueError("stop_strings are looked for in an answer's text: give tokenizer, too")
        self.tokenizer = tokenizer
        given = [strings] if isinstance(strings, str) else strings
        self.strings = [string for string in given if string]

    def length(self, ids: list[int]) -> int | None:
        """How many tokens of an answer hold the first stop string whole, or None."""
        if not self._holds(ids):
            return None
        return bisect_left(range(len(ids)), True, key=lambda count: self._holds(ids[:count]))

    def before(self, ids: list[int]) -> str:
        """The text before the first stop string, without special tokens."""
        text = self._text(ids)
        places = [place for string in self.strings if (place := text.find(string)) >= 0]
        if not places:
            return self._plain(ids)
        end = min(places)
        lengths = [len(self._text(ids[:count])) for count in range(len(ids) + 1)]
        count = bisect_right(lengths, end) - 1
        part = text[lengths[count] : end]  # of the token in which the stop string begins
        special = not self._plain(ids[count : count + 1])
        return self._plain(ids[:count]) + ("" if special else part)

    def _holds(self, ids: list[int]) -> bool:
        text = self._text(ids)
        return any(string in text for string in self.strings)

    def _text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def _plain(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


def answers(
    tokenizer: PreTrainedTokenizerBase, sequences: Tensor, stops: str | Sequence[str] = ()
) -> list[str]:
    """The texts of answers ``[B, N]``, up to a stop string, without special tokens."""
    found = StopStrings(tokenizer, stops)
    return [found.before(row) for row in sequences.tolist()]
