"""A plain eager Qwen3 for one row, in pieces small enough to restrict layer by layer.

Only weights come from the transformers module. Norms, rotary, attention, masks and MLP are written
out, in the model's dtype where transformers does so and in at least fp32 elsewhere (in float64
norms and softmax are float64 too; rotary tables are fp32 values, as transformers builds them).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import Qwen3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3RMSNorm

from tests.reference.algorithm import compute_dtype

History = list[tuple[Tensor, Tensor]]
"""Per layer: key [G, S, D] (after k norm and rotary) and value [G, S, D]."""


@dataclass(frozen=True)
class Rotary:
    """cos and sin, [N, D], of N tokens."""

    cos: Tensor
    sin: Tensor

    def rows(self, index: list[int]) -> Rotary:
        return Rotary(self.cos[index], self.sin[index])

    def rotate(self, x_HND: Tensor) -> Tensor:
        first, second = x_HND.chunk(2, dim=-1)
        return x_HND * self.cos + torch.cat([-second, first], dim=-1) * self.sin


def rotary(model: Qwen3ForCausalLM, position_ids_N: Tensor, dtype: torch.dtype) -> Rotary:
    tables = model.model.rotary_emb
    angle = position_ids_N.float()[:, None] * tables.inv_freq.float()[None, :]
    angle = torch.cat([angle, angle], dim=-1)
    scaling = tables.attention_scaling
    return Rotary((angle.cos() * scaling).to(dtype), (angle.sin() * scaling).to(dtype))


def linear(module: nn.Linear, x: Tensor) -> Tensor:
    y = x @ module.weight.T
    return y if module.bias is None else y + module.bias


def rms_norm(module: Qwen3RMSNorm, x: Tensor) -> Tensor:
    wide = x.to(compute_dtype(x.dtype))
    wide = wide / (wide.pow(2).mean(-1, keepdim=True) + module.variance_epsilon).sqrt()
    return module.weight * wide.to(x.dtype)


def embed(model: Qwen3ForCausalLM, ids_N: Tensor) -> Tensor:
    return model.model.embed_tokens.weight[ids_N]


def project(
    layer: Qwen3DecoderLayer, hidden_NE: Tensor, tables: Rotary
) -> tuple[Tensor, Tensor, Tensor]:
    """q [H, N, D], k [G, N, D], v [G, N, D]: exactly what the attention call receives."""
    attn = layer.self_attn
    x = rms_norm(layer.input_layernorm, hidden_NE)
    query, key, value = (
        linear(module, x).unflatten(-1, (-1, attn.head_dim))
        for module in (attn.q_proj, attn.k_proj, attn.v_proj)
    )
    query, key = rms_norm(attn.q_norm, query), rms_norm(attn.k_norm, key)
    return (
        tables.rotate(query.transpose(0, 1)),
        tables.rotate(key.transpose(0, 1)),
        value.transpose(0, 1),
    )


def attend(
    layer: Qwen3DecoderLayer, query_HND: Tensor, key_GLD: Tensor, value_GLD: Tensor, bias_NL: Tensor
) -> Tensor:
    """Attention over L keys, head by head; `bias` is added to the scores. Returns [N, E]."""
    if bool(torch.isneginf(bias_NL).all(dim=-1).any()):
        raise ValueError("a query sees no key at all")
    attn = layer.self_attn
    heads = query_HND.shape[0]
    group = heads // key_GLD.shape[0]
    outputs = []
    for h in range(heads):
        score = (query_HND[h] @ key_GLD[h // group].T) * attn.scaling + bias_NL
        weight = torch.softmax(score.to(compute_dtype(score.dtype)), dim=-1).to(score.dtype)
        outputs.append(weight @ value_GLD[h // group])
    return linear(attn.o_proj, torch.cat(outputs, dim=-1))


def finish(layer: Qwen3DecoderLayer, hidden_NE: Tensor, attended_NE: Tensor) -> Tensor:
    """Residual, then the MLP with its own residual."""
    hidden = hidden_NE + attended_NE
    x = rms_norm(layer.post_attention_layernorm, hidden)
    gate, up = linear(layer.mlp.gate_proj, x), linear(layer.mlp.up_proj, x)
    return hidden + linear(layer.mlp.down_proj, nn.functional.silu(gate) * up)


def logits(model: Qwen3ForCausalLM, hidden_NE: Tensor) -> Tensor:
    return linear(model.lm_head, rms_norm(model.model.norm, hidden_NE))


def additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as a bias: bool True -> 0, False -> -inf; a float mask's finfo.min becomes -inf."""
    if visible.dtype == torch.bool:
        return torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, -math.inf)
    hidden = visible <= torch.finfo(visible.dtype).min
    return visible.to(dtype).masked_fill(hidden, -math.inf)


def no_history(model: Qwen3ForCausalLM) -> History:
    config = model.config
    empty = model.lm_head.weight.new_zeros(config.num_key_value_heads, 0, config.head_dim)
    return [(empty, empty) for _ in range(config.num_hidden_layers)]


@torch.no_grad()
def dense_forward(
    model: Qwen3ForCausalLM,
    ids_T: Tensor,
    history: History,
    position_ids_T: Tensor,
    visible: Tensor | None = None,
) -> tuple[Tensor, History]:
    """All tokens through all layers, seeing history and each other: logits [T, V], their K/V."""
    hidden = embed(model, ids_T)
    tables = rotary(model, position_ids_T, hidden.dtype)
    keys = history[0][0].shape[1] + len(ids_T)
    if visible is None:
        visible = torch.ones(len(ids_T), keys, dtype=torch.bool)
    bias = additive(visible, hidden.dtype)
    stored: History = []
    for layer, (key_S, value_S) in zip(model.model.layers, history, strict=True):
        query, key, value = project(layer, hidden, tables)
        stored.append((key, value))
        keys_all, values_all = torch.cat([key_S, key], 1), torch.cat([value_S, value], 1)
        hidden = finish(layer, hidden, attend(layer, query, keys_all, values_all, bias))
    return logits(model, hidden), stored


def extend(history: History, block: History) -> History:
    """Commit: the history with a block's K/V appended."""
    return [
        (torch.cat([key_S, key], dim=1), torch.cat([value_S, value], dim=1))
        for (key_S, value_S), (key, value) in zip(history, block, strict=True)
    ]
