"""Models that the benchmarks run: the trained one, and random weights in public sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

__all__ = ["ALIGNED", "RANDOM", "build"]

ALIGNED = Path(__file__).resolve().parent.parent / "examples" / "tiny_dllm" / "aligned_checkpoint"

RANDOM: dict[str, dict[str, Any]] = {
    "bench-3l": {
        "hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 384, "vocab_size": 512,
    },
    "bench-12l": {
        "hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 64, "intermediate_size": 1536, "vocab_size": 8192,
    },
    "sdar-0.6b": {
        "hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 3072, "vocab_size": 151936,
    },
    "sdar-1.7b": {
        "hidden_size": 2048, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 6144, "vocab_size": 151936,
    },
    "sdar-8b": {
        "hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 12288,
        "vocab_size": 151936, "tie_word_embeddings": False,
    },
    "moe-mini": {
        "hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 64, "moe_intermediate_size": 512, "vocab_size": 8192,
        "num_experts": 16, "num_experts_per_tok": 2, "norm_topk_prob": True,
        "experts_implementation": "grouped_mm",
    },
}  # fmt: skip
"""Sizes of Qwen3 models with random weights; the sdar ones are those of Qwen3-0.6B, -1.7B and -8B.

``moe-mini`` routes as SDAR-MoE does; LLaDA2's groups of experts cost the same.
"""


def build(
    shape: str,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    layers: int | None = None,
) -> Qwen3ForCausalLM | Qwen3MoeForCausalLM:
    """The model of a shape; the last id of its vocabulary serves as mask token.

    ``layers``: another number of them than the shape's.
    """
    torch.manual_seed(0)
    sizes = {"tie_word_embeddings": True} | RANDOM[shape]
    if layers is not None:
        sizes["num_hidden_layers"] = layers
    config = (Qwen3MoeConfig if "num_experts" in sizes else Qwen3Config)(**sizes)
    with torch.device(device):
        model: Qwen3ForCausalLM | Qwen3MoeForCausalLM = AutoModelForCausalLM.from_config(
            config, dtype=dtype
        )
    return model.eval()
