"""The dialect of LLaDA2.x-MoE: fused q, k, v; partial rotary; group-limited routing; Cache objects.

Attention is eager with a softmax in fp32. Experts are computed in one of three ways: all of them on
every token (``dense``); weights picked per token (``picked``); tokens sorted by expert
(``sorted``). The public file's own loop over experts (``counted``) reads counts on the host, which
breaks the graph.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from tests.support.models import parts
from tests.support.models.dream import repeat_kv
from tests.support.models.parts import (
    GatedMLP,
    RMSNorm,
    inverse_frequencies,
    randomize,
    rotate_half,
)


def grouped_mm(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Rows of each expert by its weights; torch's own operator traces in bf16 only."""
    if rows.dtype == torch.bfloat16:
        return F.grouped_mm(rows, weights, offs=ends)
    out: Tensor = torch.ops.transformers.grouped_mm_fallback(rows, weights, ends)
    return out


class Router(nn.Module):
    def __init__(self, size: int, experts: int, groups: int, kept: int, top: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, size))
        self.register_buffer("expert_bias", torch.linspace(-0.1, 0.1, experts))
        self.experts, self.groups, self.kept, self.top = experts, groups, kept, top

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.view(-1, x.shape[-1])
        scores = torch.sigmoid(F.linear(x.float(), self.weight.float()))
        biased = scores + self.expert_bias
        tokens = biased.shape[0]
        best = biased.view(tokens, self.groups, -1).topk(2, dim=-1)[0].sum(dim=-1)
        chosen = torch.topk(best, k=self.kept, dim=-1, sorted=False)[1]
        allowed = torch.zeros_like(best)
        allowed.scatter_(1, chosen, 1)
        allowed = (
            allowed.unsqueeze(-1)
            .expand(tokens, self.groups, self.experts // self.groups)
            .reshape(tokens, -1)
        )
        open_scores = biased.masked_fill(~allowed.bool(), float("-inf"))
        index = torch.topk(open_scores, k=self.top, dim=-1)[1]
        weights = torch.gather(scores, dim=1, index=index)
        weights /= weights.sum(dim=-1, keepdim=True) + 1e-20
        return index, weights * 2.5


class Experts(nn.Module):
    def __init__(self, size: int, inner: int, experts: int, way: str) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(experts, 2 * inner, size))
        self.down = nn.Parameter(torch.empty(experts, size, inner))
        self.way = way

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        ways = {
            "dense": self.dense,
            "picked": self.picked,
            "sorted": self.ordered,
            "counted": self.counted,
        }
        return ways[self.way](x, index, weights)

    def dense(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        chosen = F.one_hot(index, self.down.shape[0]).to(x.dtype)
        share = (chosen * weights.unsqueeze(-1).to(x.dtype)).sum(1)
        gate, up = torch.matmul(x, self.gate_up.transpose(1, 2)).chunk(2, dim=-1)
        out = torch.matmul(F.silu(gate) * up, self.down.transpose(1, 2))
        return (out * share.t().unsqueeze(-1)).sum(0)

    def picked(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        top = index.shape[-1]
        rows, ids = x.repeat_interleave(top, dim=0), index.reshape(-1)
        made = torch.bmm(self.gate_up[ids], rows.unsqueeze(-1)).squeeze(-1)
        gate, up = made.chunk(2, dim=-1)
        out = torch.bmm(self.down[ids], (F.silu(gate) * up).unsqueeze(-1)).squeeze(-1)
        out = out * weights.reshape(-1).unsqueeze(-1)
        return out.view(x.shape[0], top, x.shape[-1]).sum(dim=1).to(x.dtype)

    def ordered(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        top = index.shape[-1]
        ids, order = torch.sort(index.reshape(-1))
        rows = x[order // top]
        counts = torch.histc(ids.float(), bins=self.down.shape[0], min=0, max=len(self.down) - 1)
        ends = torch.cumsum(counts, dim=0, dtype=torch.int32)
        made = grouped_mm(rows, self.gate_up.transpose(1, 2), ends)
        gate, up = made.chunk(2, dim=-1)
        out = grouped_mm(F.silu(gate) * up, self.down.transpose(1, 2), ends)
        out = out * weights.reshape(-1)[order].unsqueeze(-1)
        back = torch.empty_like(order)
        back[order] = torch.arange(order.shape[0], device=order.device)
        return out[back].view(x.shape[0], top, x.shape[-1]).sum(dim=1).to(x.dtype)

    def counted(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """As the public file does it: counts go to the host, and the graph breaks."""
        counts = F.one_hot(index, self.down.shape[0]).sum((0, 1))
        order = index.view(-1).argsort()
        rows, outs, start = x[order // index.shape[1]], [], 0
        for expert, count in enumerate(counts.cpu().numpy()):
            part = rows[start : start + int(count)]
            gate, up = (part @ self.gate_up[expert].t()).chunk(2, dim=-1)
            outs.append((F.silu(gate) * up) @ self.down[expert].t())
            start += int(count)
        made = torch.empty_like(rows)
        made[order] = torch.cat(outs)
        return (made.view(*index.shape, -1) * weights.unsqueeze(-1)).sum(1).to(x.dtype)


class SparseMLP(nn.Module):
    def __init__(self, size: int, inner: int, experts: int, way: str) -> None:
        super().__init__()
        self.gate = Router(size, experts, groups=4, kept=2, top=2)
        self.experts = Experts(size, inner, experts, way)
        self.shared_experts = GatedMLP(size, inner)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, size = x.shape
        index, weights = self.gate(x)
        out = self.experts(x.view(-1, size), index, weights).view(batch, length, size)
        return out + self.shared_experts(x)


class Attention(nn.Module):
    def __init__(self, size: int, heads: int, groups: int, head: int, layer: int) -> None:
        super().__init__()
        self.heads, self.groups, self.head, self.layer = heads, groups, head, layer
        self.query_key_value = nn.Linear(size, (heads + 2 * groups) * head, bias=False)
        self.query_layernorm, self.key_layernorm = RMSNorm(head), RMSNorm(head)
        self.dense = nn.Linear(heads * head, size, bias=False)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        cache: DynamicCache | None,
        tables: tuple[Tensor, Tensor],
    ) -> Tensor:
        batch, length, _ = x.shape
        fused = self.query_key_value(x).view(batch, length, -1, self.head)
        query, key, value = fused.split([self.heads, self.groups, self.groups], dim=-2)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        query, key = self.query_layernorm(query), self.key_layernorm(key)
        cos, sin = (table.unsqueeze(1) for table in tables)
        query, key = self.turn(query, cos, sin), self.turn(key, cos, sin)
        if cache is not None:
            key, value = cache.update(key, value, self.layer)
        times = self.heads // self.groups
        key, value = repeat_kv(key, times), repeat_kv(value, times)
        if mask is not None:
            mask = mask[:, :, :, : key.shape[-2]]
        out = parts.softmax_attention(query, key, value, mask, self.head**-0.5)
        return self.dense(out.transpose(1, 2).contiguous().reshape(batch, length, -1))

    def turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Only the first features are rotated."""
        turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
        return torch.cat([turned * cos + rotate_half(turned) * sin, rest], dim=-1)


class Layer(nn.Module):
    def __init__(self, attention: Attention, mlp: nn.Module, size: int) -> None:
        super().__init__()
        self.attention, self.mlp = attention, mlp
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(size), RMSNorm(size)


class LLaDA2(nn.Module):
    """``forward(input_ids [B, T], attention_mask [B, 1, T, S + T], position_ids, ...)``."""

    inv_freq: Tensor

    def __init__(
        self,
        *,
        vocab: int = 61,
        size: int = 40,
        layers: int = 4,
        heads: int = 6,
        groups: int = 2,
        head: int = 16,
        inner: int = 24,
        experts: int = 8,
        way: str = "dense",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(vocab, size)
        self.layers = nn.ModuleList(
            Layer(
                Attention(size, heads, groups, head, index),
                SparseMLP(size, inner, experts, way) if index else GatedMLP(size, 2 * inner),
                size,
            )
            for index in range(layers)
        )
        self.norm = RMSNorm(size)
        self.lm_head = nn.Linear(size, vocab, bias=False)
        self.register_buffer("inv_freq", inverse_frequencies(head // 2), persistent=False)
        self.groups, self.head = groups, head
        randomize(self, seed)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
    ) -> CausalLMOutputWithPast:
        x = self.word_embeddings(input_ids)
        if position_ids is None:
            seen = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = torch.arange(seen, seen + x.shape[1], device=x.device).unsqueeze(0)
        angles = position_ids.float().unsqueeze(-1) * self.inv_freq
        table = torch.cat((angles, angles), dim=-1)
        tables = (table.cos().to(x.dtype), table.sin().to(x.dtype))
        for layer in self.layers:
            mixed = layer.attention(
                layer.input_layernorm(x), attention_mask, past_key_values, tables
            )
            x = x + mixed
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        logits = self.lm_head(self.norm(x)).float()
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)
