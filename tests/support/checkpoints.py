"""Small models in folders, for tests that do not ask whether answers are right."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, AutoTokenizer, Qwen3ForCausalLM

__all__ = ["LAYERS", "save_first_layers"]

LAYERS = 3
"""The first three of a trained model's eight compile in less than half of its time."""


def save_first_layers(trained: Path, folder: Path) -> Path:
    """Save a model's first layers, and its tokenizer, in ``folder``; its answers are wrong."""
    config = AutoConfig.from_pretrained(trained)
    config.num_hidden_layers, config.layer_types = LAYERS, config.layer_types[:LAYERS]
    Qwen3ForCausalLM.from_pretrained(trained, config=config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(trained).save_pretrained(folder)
    return folder
