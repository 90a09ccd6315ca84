"""Operands of which no number is read, and tensors as long as sizes say, beside a history."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import focus_compile
from focus_compile import focus_backend
from tests.support.harness import MASK, PAPER, eager_inner
from tests.support.models.parts import randomize

BATCH, HEADS, HEAD, LAYERS, HISTORY, BLOCK = 3, 4, 12, 3, 11, 8
Change = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor | None]]


def type_as(q: Tensor, k: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """A table that is cast before its window is taken, by keys and by queries."""
    keys, tokens = k.shape[2], q.shape[2]
    whole = table[:, :, :keys]
    return q * whole.type_as(k)[:, :, keys - tokens :], k * whole.type_as(q), None


def to_another(q: Tensor, k: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    return q.to(k), k * table.to(q)[:, :, : k.shape[2]], None


def shaped_alike(q: Tensor, k: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    turned = k * table[:, :, : k.shape[2]].expand_as(k)
    return q.flatten(2).view_as(q) + q.flatten(2).reshape_as(q), turned, None


def filled_alike(q: Tensor, k: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    k = k * torch.ones_like(k) + torch.zeros_like(k)
    return q * torch.full_like(k[:, :, : q.shape[2]], 0.5), k, torch.full_like(q @ k.mT, 0.25)


def sized_mask(q: Tensor, k: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """A mask of the square of all keys, cut to the queries."""
    keys, tokens = k.shape[2], q.shape[2]
    hidden = torch.full((keys, keys), -torch.inf)
    near = torch.ones(keys, keys, dtype=torch.bool).tril(9).triu(-9)
    return q, k, hidden.masked_fill(near, 0)[keys - tokens :]


def new_mask(q: Tensor, k: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    rows, tokens, keys = q.shape[0], q.shape[2], k.shape[2]
    mask = q.new_zeros(rows, 1, tokens, keys) + q.new_ones(keys) + q.new_full((tokens, 1), 0.5)
    return q, k, mask + torch.empty(tokens, keys).fill_(0.5) + torch.eye(tokens, keys)


def tiled_mask(q: Tensor, k: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    return q, k, torch.zeros(1, 1, q.shape[2], k.shape[2]).repeat(q.shape[0], 1, 1, 1)


def distance(q: Tensor, k: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    keys = torch.arange(k.shape[2])
    apart = keys - torch.arange(k.shape[2] - q.shape[2], k.shape[2])[:, None]
    return q, k, -0.1 * apart.abs()


class Model(nn.Module):
    """``change`` makes of queries, of keys of history and block, and of a table what is attended
    to, and a mask. ``kept``: a bias for all keys, made in the first call.
    """

    table: Tensor
    kept: Tensor | None = None

    def __init__(self, change: Change) -> None:
        super().__init__()
        size = HEADS * HEAD
        self.change = change
        self.wte, self.head = nn.Embedding(61, size), nn.Linear(size, 61)
        self.qkv = nn.ModuleList(nn.Linear(size, 3 * size) for _ in range(LAYERS))
        self.out = nn.ModuleList(nn.Linear(size, size) for _ in range(LAYERS))
        self.register_buffer("table", torch.linspace(0.5, 1.5, 64).view(1, 1, -1, 1))
        randomize(self, 0)

    def forward(self, ids: Tensor, past: Any) -> Tensor:
        x = self.wte(ids)
        for qkv, out, (keys, values) in zip(self.qkv, self.out, past, strict=True):
            q, k, v = (
                part.unflatten(-1, (HEADS, HEAD)).transpose(1, 2)
                for part in qkv(F.layer_norm(x, x.shape[-1:])).chunk(3, -1)
            )
            k, v = torch.cat([keys, k], 2), torch.cat([values, v], 2)
            if self.kept is None:
                self.kept = torch.ones(k.shape[2], k.shape[2]).triu(1)
            q, k, mask = self.change(q, k, self.table)
            attended = F.scaled_dot_product_attention(q, k, v, mask)
            x = x + out(attended.transpose(1, 2).flatten(2))
        logits: Tensor = self.head(x)
        return logits


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, BATCH])
@pytest.mark.parametrize("dynamic", [True, False], ids=["symbols", "numbers"])
@pytest.mark.parametrize(
    "change",
    [
        type_as, to_another, shaped_alike, filled_alike, sized_mask, new_mask, tiled_mask, distance,
    ],
)  # fmt: skip
def test_applied(change: Change, dynamic: bool, batch: int) -> None:
    """Nothing evicted: as eager, and so is what the model keeps; for other sizes, too."""
    torch.manual_seed(0)
    model = Model(change).eval()
    options = {"mask_token_id": MASK, "strict": True, **PAPER}
    compiled = torch.compile(
        model,
        backend=lambda gm, given: focus_backend(gm, given, options=options, inner=eager_inner),
        dynamic=dynamic,
        fullgraph=True,
    )
    for history, tokens in ((HISTORY, BLOCK), (7, 5)):
        ids = torch.full((batch, tokens), MASK)
        ids[:, 1] = 7
        past = [
            tuple(torch.randn(batch, HEADS, history, HEAD) for _ in "kv") for _ in range(LAYERS)
        ]
        model.kept = None
        expected = model(ids, past)
        bias, model.kept = model.kept, None
        with focus_compile.session(alpha=1e9) as focus:
            actual = compiled(ids, past)
            assert focus.stats.steps == 1
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
        assert torch.equal(model.kept, bias)
