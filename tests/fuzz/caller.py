"""The caller's side of a sequence: rows of a batch, what is decoded in them, their histories."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.fuzz.subjects import RowDraw
from tests.support.harness import MASK

LONGEST = 24
"""History of a caller who commits; beyond, the next request starts."""


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@dataclass
class Caller:
    """One batch of requests in mid-block.

    ``rows``: a seed per row, of its history; ``window``: the block within the canvas, or None.
    """

    seed: int
    batch: int
    tokens: int
    history: int
    given: bool
    ids: Tensor = field(init=False)
    masked: Tensor = field(init=False)
    rows: list[int] = field(init=False)
    window: tuple[int, int] | None = None
    turns: Any = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        self.rows = [self.seed * 100 + next(self.turns) for _ in range(self.batch)]
        self.open_block(self.seed)

    def number(self, below: int) -> int:
        """Another number at every turn."""
        made = torch.randint(below, (), generator=generator(self.seed + 7 * next(self.turns)))
        return int(made)

    def open_block(self, number: int) -> None:
        """All masks; or, now and then, a block in which some tokens are there already."""
        shape, source = (self.batch, self.tokens), generator(self.seed + number)
        self.ids = torch.randint(0, MASK, shape, generator=source)
        share = torch.rand(self.batch, 1, generator=source) if number % 3 == 0 else 1.0
        self.masked = torch.rand(shape, generator=source) < share
        if not self.inside().any():
            start = 0 if self.window is None else self.window[0]
            self.masked[0, start] = True

    def inside(self) -> Tensor:
        """Masks within the window."""
        if self.window is None:
            return self.masked
        inside = torch.zeros_like(self.masked)
        inside[:, slice(*self.window)] = True
        return self.masked & inside

    def draw(self) -> RowDraw:
        """The next call. Open positions hold mask tokens, or, where masks are given, anything."""
        open_token = torch.full_like(self.ids, MASK)
        if self.given:
            source = generator(self.seed + next(self.turns))
            open_token = torch.randint(0, MASK, self.ids.shape, generator=source)
        ids = torch.where(self.masked, open_token, self.ids)
        visible = torch.stack([self._visible(row) for row in self.rows])
        return RowDraw(ids, self.inside().clone(), visible, self.history, 0, rows=tuple(self.rows))

    def _visible(self, row: int) -> Tensor:
        """What a row's tokens see: a tenth or a half is hidden, or the row is padded."""
        keys = self.history + self.tokens
        source = generator(row)
        share = (0.9, 0.5, 1.0)[row % 3]
        seen = torch.rand(self.tokens, keys, generator=source) < share
        if row % 3 == 2:
            seen[:, : self.history // 2] = False
        itself = torch.arange(self.tokens)
        seen[itself, self.history + itself] = True
        return seen

    def decode(self, decodable: Tensor, number: int) -> None:
        """Up to three of the decodable masks of every row become tokens."""
        where = decodable & self.inside()
        order = torch.rand(where.shape, generator=generator(self.seed + number))
        order = order.masked_fill(~where, 2.0).argsort(1).argsort(1)
        counts = torch.randint(0, 4, (self.batch, 1), generator=generator(number))
        self.masked = self.masked & ~(where & (order < counts))

    def fill(self) -> None:
        """All that is masked becomes tokens."""
        self.masked = torch.zeros_like(self.masked)

    def keep_rows(self, order: list[int]) -> None:
        """Rows in another order, or some of them, or some twice."""
        self.ids, self.masked = self.ids[order], self.masked[order]
        self.rows, self.batch = [self.rows[index] for index in order], len(order)
