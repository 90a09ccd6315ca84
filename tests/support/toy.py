"""The smallest model that FOCUS applies to, with a place to put an operator between its layers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCAB, HEADS, SIZE = 23, 3, 4
HIDDEN = HEADS * SIZE

Between = Callable[[Tensor], Tensor]


class Attention(nn.Module):
    """Self-attention, everything visible."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(HIDDEN, HIDDEN) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = (
            f(x).view(batch, tokens, HEADS, SIZE).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(q, k, v)
        return self.o(y.transpose(1, 2).reshape(batch, tokens, HIDDEN))


class Toy(nn.Module):
    """Embedding, attention layers, head; ``between`` acts on the residual after each layer."""

    def __init__(self, between: Between = torch.relu, layers: int = 3) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.ModuleList(Attention() for _ in range(layers))
        self.head = nn.Linear(HIDDEN, VOCAB)
        self.between = between

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = x + layer(x)
            x = self.between(x)
        return self.head(x)


class Graphs(nn.Module):
    """Parts of a model that somebody may compile alone."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Attention()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)
