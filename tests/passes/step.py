"""One denoising step of four rows, worked by hand, and what attention must be in it.

Row 0: the first step of a block. Row 1: one in the middle, whose first token is final. Row 2: idle.
Row 3: its target is above the number of its masks, so that nothing is evicted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.passes.tiny import BATCH, GROUPS, HEADS, LAYERS, PAST, SIZE, TOKENS, Values


def flags(*rows: str) -> Tensor:
    return torch.tensor([[letter == "1" for letter in row] for row in rows])


FED = flags("1111111", "0111111", "0000000", "0001111")
MASKED = flags("1111111", "0011110", "0000000", "0000011")
WRITTEN01 = flags("0000000", "1111111", "1111111", "1111100")
WRITTEN = flags("0000000", "1111101", "1111111", "1111100")
DELTA = torch.tensor(
    [
        [0.0, 0.0, 0.0, 0.0, 9.0, 0.0, 0.0],
        [0.0, 0.0, 1.0, 5.0, 1.0, 1.0, 0.0],
        [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
        [0.0, 0.0, 0.0, 0.0, 0.0, 7.0, 0.0],
    ]
)
RETAINED = flags("1111100", "0111001", "0000000", "0001111")
"""With alpha 1.5 and averages 1, 1, 1, 2 the targets are 2, 2, 0, 2 (of 7, 4, 0, 2 masked).

Row 0: one delta, 9, is a standard deviation above the mean, and the target is two: position 4, and
the leftmost of its equals, 0. The left neighbour, 3, comes along, and nothing has been written
below 4: 1 and 2 too. Row 1: position 3, and the leftmost of its equals, 2; all has been written, so
that 4 and 5 go; 1 and 6 are decoded but not final, and stay.
"""


def tables(keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """tokens ``[N]``, inverse ``[B, T]`` and rows ``[B, R]`` of kept tokens, by counting."""
    pairs = keep.nonzero().tolist()
    inverse = torch.zeros(keep.shape, dtype=torch.int64)
    rows = torch.zeros(len(keep), max(sum(row) for row in keep.tolist()), dtype=torch.int64)
    count = [0] * len(keep)
    for n, (b, t) in enumerate(pairs):
        inverse[b, t], rows[b, count[b]] = n, t
        count[b] += 1
    return torch.tensor([b * keep.shape[1] + t for b, t in pairs]), inverse, rows


def controls(prefix: bool = False, past: int = PAST, layers: int = LAYERS, last: int = 1) -> Values:
    """What the passes ask for, by name; ``DELTA`` is the signal whatever the importances are.

    ``last``: the second scored layer.
    """
    fed_tokens, fed_inverse, fed_rows = tables(FED)
    tokens, _, rows = tables(RETAINED)
    values = {
        "masked": MASKED,
        "fed": FED,
        "progress": torch.tensor([-1, 6, 6, 4]),
        "average": torch.tensor([1.0, 1.0, 1.0, 2.0]),
        "alpha": torch.tensor(1.5),
        "signal_weights": torch.zeros(2),
        "signal_bias": DELTA,
        "fed_tokens": fed_tokens,
        "fed_inverse": fed_inverse,
        "fed_rows": fed_rows,
        "tokens": tokens,
        "rows": rows,
        "written01": WRITTEN01,
        "written": WRITTEN,
        "prefix_visibility": torch.tensor(prefix),
        "reuse": torch.tensor(False),
    }
    generator = torch.Generator().manual_seed(1)
    for layer in range(layers):
        for part in "kv":
            stale = torch.randn(BATCH, GROUPS, past + TOKENS, SIZE, generator=generator)
            empty = torch.cat([torch.ones(BATCH, past).bool(), ~written(layer, last)], 1)
            stale.transpose(1, 2)[empty] = math.nan  # read by nobody
            values[f"slots{layer}_{part}"] = stale
    return values


def written(layer: int, last: int = 1) -> Tensor:
    return WRITTEN01 if layer <= last else WRITTEN


@dataclass(frozen=True)
class Step:
    """Attention of the step, dense: every token asks, and sees the slots that FOCUS lets it see.

    A token that is not computed asks with garbage, which no other token reads. ``given``: from
    :func:`controls`. ``last``: the second scored layer.
    """

    given: Values
    prefix: bool = False
    last: int = 1

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, values: Values
    ) -> tuple[Tensor, Tensor, Tensor]:
        stored = FED if layer <= self.last else RETAINED
        kept = FED if layer < self.last else RETAINED
        seen = stored | written(layer, self.last)
        if self.prefix:
            seen = seen & torch.stack([row.flip(0).cumsum(0).flip(0) > 0 for row in kept])
        joined = [
            self._slots(new, stored, f"{layer}_{part}", values)
            for new, part in ((key, "k"), (value, "v"))
        ]
        past = values["past0_k"].shape[2]
        slots = torch.cat([torch.ones(BATCH, past).bool(), seen], 1)
        hidden = ~(values["mask"][:, 0] & slots[:, None])
        out = torch.empty_like(query)
        for b in range(BATCH):
            for h in range(HEADS):
                keys, numbers = (part[b, h // (HEADS // GROUPS)] for part in joined)
                scores = query[b, h] @ keys.T / math.sqrt(SIZE)
                out[b, h] = scores.masked_fill(hidden[b], -math.inf).softmax(-1) @ numbers
        return out, *joined

    def _slots(self, new: Tensor, stored: Tensor, name: str, values: Values) -> Tensor:
        """History and block: new where stored in this step, else stale where written, else 0."""
        stale = self.given[f"slots{name}"][:, :, -TOKENS:]
        old = stale.nan_to_num(0)
        block = torch.where(stored[:, None, :, None], new, old)
        return torch.cat([values[f"past{name}"], block], 2)
