"""The dialect of Dream and DiffuCoder, with Fast-dLLM's cache.

Positions are counted in the graph, rotary tables made by a matmul; the cache holds keys before the
rotary embedding and with folded heads, ``[B, S, G * D]``; grouped heads are expanded by hand; SDPA
is called with keywords; the model returns a tuple, and logits of the last tokens only if asked.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.models.parts import (
    GatedMLP,
    RMSNorm,
    inverse_frequencies,
    randomize,
    rotate_half,
)

Past = list[tuple[Tensor, Tensor]]


def repeat_kv(x: Tensor, times: int) -> Tensor:
    batch, groups, length, size = x.shape
    if times == 1:
        return x
    x = x[:, :, None, :, :].expand(batch, groups, times, length, size)
    return x.reshape(batch, groups * times, length, size)


class Attention(nn.Module):
    branches = False
    """Whether the mask's values are looked at, as SDAR's public file does: it breaks the graph."""
    folded = True
    """Whether the cache holds heads folded, or ``[B, S, G, D]``."""

    def __init__(self, size: int, heads: int, groups: int, head: int) -> None:
        super().__init__()
        self.heads, self.groups, self.head = heads, groups, head
        self.q_proj = nn.Linear(size, heads * head)
        self.k_proj = nn.Linear(size, groups * head)
        self.v_proj = nn.Linear(size, groups * head)
        self.o_proj = nn.Linear(heads * head, size, bias=False)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        past: tuple[Tensor, Tensor] | None,
        tables: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        if self.branches and mask is not None and torch.all(mask):
            mask = None
        batch, length, _ = x.shape
        query, key, value = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if not self.folded:
            key, value = (x.unflatten(-1, (self.groups, self.head)) for x in (key, value))
        if past is not None:
            key = torch.cat([past[0], key], dim=1)
            value = torch.cat([past[1], value], dim=1)
        present = (key, value)
        query = query.view(batch, length, self.heads, self.head).transpose(1, 2)
        key = key.view(batch, -1, self.groups, self.head).transpose(1, 2)
        value = value.view(batch, -1, self.groups, self.head).transpose(1, 2)
        cos, sin = (table.unsqueeze(1) for table in tables)
        keys = key.shape[-2]
        window = slice(keys - length, keys)
        query = query * cos[:, :, window, :] + rotate_half(query) * sin[:, :, window, :]
        key = key * cos + rotate_half(key) * sin
        times = self.heads // self.groups
        out = F.scaled_dot_product_attention(
            query=query,
            key=repeat_kv(key, times),
            value=repeat_kv(value, times),
            attn_mask=mask,
            dropout_p=0.0,
            is_causal=False,
        )
        return self.o_proj(out.transpose(1, 2).contiguous().view(batch, length, -1)), present


class Layer(nn.Module):
    def __init__(self, size: int, heads: int, groups: int, head: int, inner: int) -> None:
        super().__init__()
        self.self_attn = Attention(size, heads, groups, head)
        self.mlp = GatedMLP(size, inner)
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(size), RMSNorm(size)


class Dream(nn.Module):
    """``forward(input_ids [B, T], attention_mask, past_key_values, use_cache, ...)``."""

    inv_freq: Tensor

    def __init__(
        self,
        *,
        vocab: int = 61,
        size: int = 40,
        layers: int = 3,
        heads: int = 6,
        groups: int = 2,
        head: int = 16,
        inner: int = 72,
        folded: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocab, size)
        self.layers = nn.ModuleList(Layer(size, heads, groups, head, inner) for _ in range(layers))
        self.norm = RMSNorm(size)
        self.lm_head = nn.Linear(size, vocab, bias=False)
        self.register_buffer("inv_freq", inverse_frequencies(head), persistent=False)
        self.groups, self.head, self.folded = groups, head, folded
        for layer in self.layers:
            layer.self_attn.folded = folded
        randomize(self, seed)

    def rotary(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        inverse = self.inv_freq[None, :, None].float().expand(positions.shape[0], -1, 1)
        with torch.autocast(device_type=x.device.type, enabled=False):
            angles = (inverse @ positions[:, None, :].float()).transpose(1, 2)
            table = torch.cat((angles, angles), dim=-1)
            return table.cos().to(x.dtype), table.sin().to(x.dtype)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Past | None = None,
        use_cache: bool = False,
        num_logits_to_keep: int = 0,
    ) -> tuple[Tensor | Past, ...]:
        x = self.embed_tokens(input_ids)
        seen = 0 if past_key_values is None else past_key_values[0][0].shape[1]
        positions = torch.arange(seen + x.shape[1], device=x.device).unsqueeze(0)
        tables = self.rotary(x, positions)
        presents: Past = []
        for index, layer in enumerate(self.layers):
            past = None if past_key_values is None else past_key_values[index]
            out, present = layer.self_attn(layer.input_layernorm(x), attention_mask, past, tables)
            x = x + out
            x = x + layer.mlp(layer.post_attention_layernorm(x))
            presents.append(present)
        logits = self.lm_head(self.norm(x)[:, -num_logits_to_keep:, :])
        return (presents, logits) if use_cache else (logits,)
