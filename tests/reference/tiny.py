"""A tiny Qwen3 with pairwise distinct sizes, and transformers' own eager logits for it."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from tests.reference import qwen3

BATCH, TOKENS, HISTORY, VOCAB, MASK = 3, 9, 7, 61, 60
LAYERS, HEADS, GROUPS, HEAD_DIM, HIDDEN = 5, 6, 2, 16, 40


def tiny_model() -> Qwen3ForCausalLM:
    """Weights large enough that attention is peaked and selection has something to select."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=72,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        head_dim=HEAD_DIM,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    model = Qwen3ForCausalLM(config).eval()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


def tiny_prompt() -> Tensor:
    return torch.randint(0, MASK, (HISTORY,), generator=torch.Generator().manual_seed(1))


def block(seed: int, decoded: int) -> tuple[Tensor, Tensor, Tensor]:
    """ids, masked and position ids of a block with some decoded tokens at random positions."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.full((TOKENS,), MASK)
    known = torch.randperm(TOKENS, generator=generator)[:decoded]
    ids[known] = torch.randint(0, MASK, (decoded,), generator=generator)
    return ids, ids == MASK, HISTORY + torch.arange(TOKENS)


def block_causal(prompt_length: int, total: int) -> Tensor:
    """The prompt sees itself; a block sees everything up to its own end."""
    index = (torch.arange(total) - prompt_length).div(TOKENS, rounding_mode="floor").clamp(min=-1)
    return index[:, None] >= index[None, :]


@torch.no_grad()
def eager(model: Qwen3ForCausalLM, ids: Tensor, visible: Tensor) -> Tensor:
    """transformers' logits [L, V] under an explicit mask."""
    bias = qwen3.additive(visible, torch.float32)[None, None]
    return model(ids[None], attention_mask={"full_attention": bias}, use_cache=False).logits[0]
