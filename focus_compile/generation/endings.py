"""Where the rows of a generation end: at an end of text, a stop string, or a stopping criterion.

A block holds many tokens, and a row may end within it. What ends a row is looked for after each
token, as if tokens had come one by one; what follows is cut off.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteriaList

from focus_compile.generation.text import StopStrings

__all__ = ["Endings"]

NEVER = torch.iinfo(torch.int64).max


class Endings:
    """The length at which each row ended, int64 ``[B]``.

    Args:
        prompts: ``[B, P]``; ends: ids that end a text; early: whether such a row stops.
    """

    def __init__(
        self,
        prompts: Tensor,
        ends: list[int],
        early: bool,
        criteria: StoppingCriteriaList,
        stops: StopStrings | None,
    ) -> None:
        self.prompt = prompts.shape[1]
        self.ends = torch.tensor(ends, dtype=torch.int64, device=prompts.device)
        self.early, self.criteria, self.stops = early, criteria, stops
        self.lengths = torch.full_like(prompts[:, 0], NEVER)

    def observe(self, sequences: Tensor, active: Tensor, block: int) -> Tensor:
        """Take in ``block`` more tokens of the active rows; those that go on, bool ``[B]``."""
        ended = self._end_of_text(sequences, block)
        stopped = self._criteria(sequences, active, block)
        if self.stops is not None:
            stopped = torch.minimum(stopped, self._stop_strings(sequences, active, self.stops))
        found = torch.minimum(ended, stopped)
        self.lengths = torch.minimum(self.lengths, torch.where(active, found, NEVER))
        done = found if self.early else stopped
        return active & (done == NEVER)

    def filled(self, sequences: Tensor, fill: int) -> Tensor:
        """Sequences whose rows hold ``fill`` where they have ended."""
        place = torch.arange(sequences.shape[1], device=sequences.device)
        return sequences.masked_fill(place >= self.lengths.unsqueeze(1), fill)

    def longest(self, length: int) -> int:
        """Of rows of ``length`` tokens, how many the longest has."""
        return int(self.lengths.max().clamp_max(length))

    def _end_of_text(self, sequences: Tensor, block: int) -> Tensor:
        found = torch.isin(sequences[:, -block:], self.ends)
        length = sequences.shape[1] - block + found.long().argmax(1) + 1
        return torch.where(found.any(1), length, NEVER)

    def _criteria(self, sequences: Tensor, active: Tensor, block: int) -> Tensor:
        lengths = torch.full_like(self.lengths, NEVER)
        total = sequences.shape[1]
        none: Any = None  # for scores: a block's tokens come from several forwards
        for length in range(total - block + 1, total + 1) if self.criteria else ():
            done = self.criteria(sequences[:, :length], none)
            lengths = torch.minimum(lengths, torch.where(done, length, NEVER))
            if not bool((active & (lengths == NEVER)).any()):
                break
        return lengths

    def _stop_strings(self, sequences: Tensor, active: Tensor, stops: StopStrings) -> Tensor:
        answers = sequences[:, self.prompt :].tolist()
        found = [
            stops.length(ids) if going else None
            for ids, going in zip(answers, active.tolist(), strict=True)
        ]
        lengths = [NEVER if count is None else self.prompt + count for count in found]
        return torch.tensor(lengths, device=sequences.device)
