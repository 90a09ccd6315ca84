"""The dialect of Gemma-like diffusion models, fed the whole canvas without a cache.

Every second layer sees a window and has heads of another size; attention is not scaled; queries and
keys are normed before heads are moved; grouped heads are left to SDPA; embeddings are scaled,
logits capped, and hidden states of all layers returned after them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.models.parts import RMSNorm, inverse_frequencies, randomize, rotate_half


class Attention(nn.Module):
    inv_freq: Tensor

    def __init__(self, size: int, heads: int, groups: int, head: int) -> None:
        super().__init__()
        self.head = head
        self.q_proj = nn.Linear(size, heads * head, bias=False)
        self.k_proj = nn.Linear(size, groups * head, bias=False)
        self.v_proj = nn.Linear(size, groups * head, bias=False)
        self.o_proj = nn.Linear(heads * head, size, bias=False)
        self.q_norm, self.k_norm = RMSNorm(head, 1.0), RMSNorm(head, 1.0)
        self.register_buffer("inv_freq", inverse_frequencies(head), persistent=False)

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        shape = (*x.shape[:-1], -1, self.head)
        query = self.q_norm(self.q_proj(x).view(shape))
        key = self.k_norm(self.k_proj(x).view(shape))
        value = self.v_proj(x).view(shape).transpose(1, 2)
        angles = positions[:, :, None].float() * self.inv_freq[None, None, :]
        table = torch.cat((angles, angles), dim=-1).unsqueeze(2)
        cos, sin = table.cos().to(x.dtype), table.sin().to(x.dtype)
        query = (query * cos + rotate_half(query) * sin).transpose(1, 2)
        key = (key * cos + rotate_half(key) * sin).transpose(1, 2)
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=1.0, enable_gqa=True
        )
        return self.o_proj(out.transpose(1, 2).reshape(*x.shape[:-1], -1))


class Layer(nn.Module):
    def __init__(self, size: int, heads: int, groups: int, head: int, inner: int) -> None:
        super().__init__()
        self.self_attn = Attention(size, heads, groups, head)
        self.norms = nn.ModuleList(RMSNorm(size) for _ in range(4))
        self.gate_proj = nn.Linear(size, inner, bias=False)
        self.up_proj = nn.Linear(size, inner, bias=False)
        self.down_proj = nn.Linear(inner, size, bias=False)

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.norms[1](self.self_attn(self.norms[0](x), positions, mask))
        normed = self.norms[2](x)
        hidden = F.gelu(self.gate_proj(normed), approximate="tanh") * self.up_proj(normed)
        return x + self.norms[3](self.down_proj(hidden))


class Gemma(nn.Module):
    """``forward(input_ids [B, T], position_ids [B, T], masks by kind of layer)``."""

    def __init__(
        self,
        *,
        vocab: int = 61,
        size: int = 40,
        layers: int = 3,
        heads: int = 4,
        groups: int = 2,
        head: int = 16,
        wide: int = 24,
        inner: int = 72,
        cap: float = 5.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocab, size)
        self.layers = nn.ModuleList(
            Layer(size, heads, groups, wide if index % 2 else head, inner)
            for index in range(layers)
        )
        self.norm = RMSNorm(size)
        self.cap, self.scale = cap, size**0.5
        randomize(self, seed)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        masks: dict[str, Tensor | None],
        output_hidden_states: bool = False,
    ) -> tuple[Tensor, ...]:
        x = self.embed_tokens(input_ids) * torch.tensor(self.scale, dtype=torch.float32)
        hidden = [x]
        for index, layer in enumerate(self.layers):
            x = layer(x, position_ids, masks["full" if index % 2 else "sliding"])
            hidden.append(x)
        logits = F.linear(self.norm(x), self.embed_tokens.weight)
        logits = torch.tanh(logits / self.cap) * self.cap
        return (logits, *hidden) if output_hidden_states else (logits,)
