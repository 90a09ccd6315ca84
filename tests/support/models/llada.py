"""The dialect of LLaDA, LLaDA-1.5 and Fast-dLLM's LLaDA.

Keys are cached before the rotary embedding; its tables are buffers for the longest text, sliced by
length; halves are rotated by ``view`` and ``unbind``; the cache is a list of tuples, or there is
none and the whole canvas is fed; SDPA is called with positional arguments and no mask. With
``replace_position``, as in Fast-dLLM's dual cache, the cache holds the whole canvas, and the keys
of the block are written over those that stand at these positions, or from this position on, where
it is a number (Fast-dLLM v2).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.models.parts import RMSNorm, inverse_frequencies, randomize

Past = list[tuple[Tensor, Tensor]]
Places = Tensor | slice
Put = Callable[[Tensor, Tensor, Places], Tensor]
LONGEST = 128


def setitem(past: Tensor, new: Tensor, places: Places) -> Tensor:
    """Write ``new [B, G, T, D]`` into a cache ``[B, G, M, D]``; returns it."""
    past[:, :, places] = new
    return past


class Output(NamedTuple):
    logits: Tensor
    attn_key_values: Past | None
    hidden_states: tuple[Tensor, ...] | None


class Rotary(nn.Module):
    sin: Tensor
    cos: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        angles = torch.outer(torch.arange(LONGEST).float(), inverse_frequencies(size))
        angles = torch.cat((angles, angles), dim=-1)
        self.register_buffer("sin", angles.sin()[None, None], persistent=False)
        self.register_buffer("cos", angles.cos()[None, None], persistent=False)

    def turn(self, x: Tensor, places: Places) -> Tensor:
        batch, heads, length, size = x.shape
        left, right = x.view(batch, heads, length, 2, size // 2).unbind(dim=-2)
        turned = torch.cat((-right, left), dim=-1)
        sin, cos = self.sin[:, :, places], self.cos[:, :, places]
        if sin.dim() > 4:  # every row has places of its own
            sin, cos = sin[0].transpose(0, 1), cos[0].transpose(0, 1)
        return (x * cos.type_as(x) + turned * sin.type_as(x)).to(x.dtype)

    def forward(
        self, query: Tensor, key: Tensor, replaced: Places | None = None
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(query.device.type, enabled=False):
            length, keys = query.shape[-2], key.shape[-2]
            wide_query, wide_key = query.float(), key.float()
            places = slice(keys - length, keys) if replaced is None else replaced
            turned = self.turn(wide_query, places), self.turn(wide_key, slice(0, keys))
        return turned[0].type_as(query), turned[1].type_as(key)


class Block(nn.Module):
    def __init__(self, size: int, heads: int, groups: int, inner: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.groups, head = heads, groups, size // heads
        self.causal = causal
        self.put: Put = setitem
        self.attn_norm, self.ff_norm = RMSNorm(size), RMSNorm(size)
        self.rotary_emb = Rotary(head)
        self.q_proj = nn.Linear(size, size, bias=False)
        self.k_proj = nn.Linear(size, groups * head, bias=False)
        self.v_proj = nn.Linear(size, groups * head, bias=False)
        self.attn_out = nn.Linear(size, size, bias=False)
        self.ff_proj = nn.Linear(size, inner, bias=False)
        self.up_proj = nn.Linear(size, inner, bias=False)
        self.ff_out = nn.Linear(inner, size, bias=False)

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        past: tuple[Tensor, Tensor] | None,
        replaced: Tensor | int | None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        batch, length, size = q.shape
        places = slice(replaced, replaced + length) if isinstance(replaced, int) else replaced
        head = size // self.heads
        q = q.view(batch, length, self.heads, head).transpose(1, 2)
        k = k.view(batch, length, self.groups, head).transpose(1, 2)
        v = v.view(batch, length, self.groups, head).transpose(1, 2)
        if past is not None and places is not None:
            k, v = self.put(past[0], k, places), self.put(past[1], v, places)
        elif past is not None:
            k = torch.cat((past[0], k), dim=-2)
            v = torch.cat((past[1], v), dim=-2)
        present = (k, v)
        q, k = self.rotary_emb(q, k, places)
        if self.heads != self.groups:
            times = self.heads // self.groups
            k = k.repeat_interleave(times, dim=1, output_size=self.heads)
            v = v.repeat_interleave(times, dim=1, output_size=self.heads)
        out = F.scaled_dot_product_attention(q, k, v, None, 0.0, self.causal)
        return self.attn_out(out.transpose(1, 2).contiguous().view(batch, length, size)), present

    def forward(
        self, x: Tensor, past: tuple[Tensor, Tensor] | None, replaced: Tensor | int | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        normed = self.attn_norm(x)
        out, present = self.attention(
            self.q_proj(normed), self.k_proj(normed), self.v_proj(normed), past, replaced
        )
        x = x + out
        normed = self.ff_norm(x)
        return x + self.ff_out(F.silu(self.ff_proj(normed)) * self.up_proj(normed)), present


class LLaDA(nn.Module):
    """``forward(input_ids [B, T], past_key_values, use_cache, ..., replace_position [T])``.

    ``put``: how a block's keys and values are written over others.
    """

    def __init__(
        self,
        *,
        vocab: int = 61,
        size: int = 48,
        layers: int = 3,
        heads: int = 4,
        groups: int = 4,
        inner: int = 72,
        tied: bool = False,
        causal: bool = False,
        put: Put = setitem,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.wte = nn.Embedding(vocab, size)
        self.blocks = nn.ModuleList(
            Block(size, heads, groups, inner, causal) for _ in range(layers)
        )
        for block in self.blocks:
            block.put = put
        self.ln_f = RMSNorm(size)
        self.ff_out = None if tied else nn.Linear(size, vocab, bias=False)
        self.groups, self.head, self.layers = groups, size // heads, layers
        randomize(self, seed)

    def forward(
        self,
        input_ids: Tensor,
        past_key_values: Past | None = None,
        use_cache: bool = False,
        output_hidden_states: bool = False,
        replace_position: Tensor | int | None = None,
    ) -> Output:
        x = self.wte(input_ids)
        presents: Past = []
        hidden = []
        for index, block in enumerate(self.blocks):
            hidden.append(x)
            past = None if past_key_values is None else past_key_values[index]
            x, present = block(x, past, replace_position)
            presents.append(present)
        x = self.ln_f(x)
        hidden.append(x)
        logits = F.linear(x, self.wte.weight) if self.ff_out is None else self.ff_out(x)
        return Output(
            logits,
            presents if use_cache else None,
            tuple(hidden) if output_hidden_states else None,
        )
