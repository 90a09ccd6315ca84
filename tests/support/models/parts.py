"""What the dialects share."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    def __init__(self, size: int, shift: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size).uniform_(0.5 - shift, 1.5 - shift))
        self.shift = shift

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return (self.weight + self.shift) * wide.to(x.dtype)


class GatedMLP(nn.Module):
    def __init__(self, size: int, inner: int) -> None:
        super().__init__()
        self.gate = nn.Linear(size, inner, bias=False)
        self.up = nn.Linear(size, inner, bias=False)
        self.down = nn.Linear(inner, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


def inverse_frequencies(size: int) -> Tensor:
    return 1.0 / 10_000 ** (torch.arange(0, size, 2).float() / size)


def rotate_half(x: Tensor) -> Tensor:
    left, right = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-right, left), dim=-1)


def softmax_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """Eager attention with a softmax in fp32; key heads already expanded; ``/ sqrt(size)``."""
    scores = torch.matmul(query, key.transpose(2, 3)) / (1.0 / scale)
    if mask is not None:
        scores = scores + mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return torch.matmul(weights, value)


def randomize(model: nn.Module, seed: int, spread: float = 0.15) -> None:
    """Weights so large that attention is peaked; norms stay as they are."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, spread, generator=generator)
