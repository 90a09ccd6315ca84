"""What a generation returns, and what it did at each step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["Generated"]


@dataclass(repr=False)
class Generated:
    """What :func:`~focus_compile.generate` returns with ``return_dict=True``.

    Attributes:
        sequences: int64 ``[B, P + new]``: prompt and answer; pad after a row's end of text.
        steps_per_block: for each block, int64 ``[B]``: denoising steps of each row.
        forwards: denoising forwards of the batch, commits and prefill not counted.
        decoded: tokens decoded by these.
        fed_fraction, retained_fraction: of the model's tokens, over all denoising forwards; 1 for
            a model that computes every token.
        fed_per_step: tokens of the batch that layers 0 and 1 computed, of each denoising forward
            that ran FOCUS's prefix and suffix.
        focus_steps: denoising forwards that ran FOCUS's prefix and suffix.
        retain_masks: bool ``[B, T]`` of each denoising forward; all True where a dense program ran.
            T is that of the block, or, without a cache, of the whole canvas, as in the fractions.
        rescue_masks: bool ``[B, T]`` of each of them: the retained tokens that were evicted at
            first, and computed in the same step because none of the others was sure.
        decode_masks: bool ``[B, T]`` of each denoising forward: what was decoded after it.
    """

    sequences: Tensor
    steps_per_block: list[Tensor] = field(default_factory=list)
    forwards: int = 0
    decoded: int = 0
    fed_fraction: float = 1.0
    retained_fraction: float = 1.0
    fed_per_step: list[int] = field(default_factory=list)
    focus_steps: int = 0
    retain_masks: list[Tensor] = field(default_factory=list)
    rescue_masks: list[Tensor] = field(default_factory=list)
    decode_masks: list[Tensor] = field(default_factory=list)

    def __repr__(self) -> str:
        rows, tokens = self.sequences.shape
        return (
            f"<Generated: {rows} rows of {tokens} tokens, {len(self.steps_per_block)} blocks in "
            f"{self.forwards} denoising forwards, {self.focus_steps} of them FOCUS's; "
            f"fed {self.fed_fraction:.0%}, retained {self.retained_fraction:.0%}>"
        )

    @property
    def rescued(self) -> int:
        """Tokens that were rescued, over all rows and steps."""
        return sum(int(mask.sum()) for mask in self.rescue_masks)

    @property
    def rescued_rows(self) -> int:
        """In how many steps of rows tokens were rescued."""
        return sum(int(mask.any(1).sum()) for mask in self.rescue_masks)

    @property
    def rescued_and_decoded(self) -> int:
        """How many of the rescued tokens were decoded in their step: what rescue yields."""
        pairs = zip(self.rescue_masks, self.decode_masks, strict=True)
        return sum(int((rescued & decoded).sum()) for rescued, decoded in pairs)

    @property
    def tokens_per_forward(self) -> float:
        """Tokens decoded per denoising forward of the batch."""
        return self.decoded / self.forwards if self.forwards else 0.0

    def trace(self) -> dict[str, Any]:
        """What became of each token of a block at each step, as plain data.

        ``{"block_length": T, "rows": B, "history": P, "steps": [...]}``; a step has ``block``, the
        number of the block, and ``masked``, ``retained``, ``rescued`` and ``decoded``, ``[B][T]``
        each; rescued tokens are retained ones. All is retained where a dense program ran. P: tokens
        before the first block; 0 without a cache, where T is the whole canvas.
        """
        steps: list[dict[str, Any]] = []
        done = 0
        for block, counts in enumerate(self.steps_per_block):
            forwards = self.decode_masks[done : done + int(counts.max())]
            for index, decoded in enumerate(forwards):
                flags = {
                    "masked": torch.stack(forwards[index:]).any(0),
                    "retained": self.retain_masks[done + index],
                    "rescued": self.rescue_masks[done + index],
                    "decoded": decoded,
                }
                step = {name: flag.tolist() for name, flag in flags.items()}
                steps.append({"block": block} | step)
            done += len(forwards)
        rows, length = self.decode_masks[0].shape
        history = max(0, self.sequences.shape[1] - length * len(self.steps_per_block))
        return {"block_length": length, "rows": rows, "history": history, "steps": steps}
