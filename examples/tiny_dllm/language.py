"""The tokenizer (characters, and one token per task name) and the network's configuration."""

from __future__ import annotations

from string import ascii_lowercase, digits

import torch
from tasks import MAX_ANSWER, MAX_PROMPT, TASKS
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

BLOCK_LENGTH = 32
PAD, EOS, MASK, UNK = "<pad>", "<eos>", "<mask>", "<unk>"
WORDS = tuple(f"{task.name}:" for task in TASKS)
VOCABULARY = (PAD, EOS, MASK, UNK, *WORDS, *digits, *ascii_lowercase, *"=|;")


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Text -> task words and characters -> ids; decoding joins the pieces without spaces."""
    vocabulary = {token: index for index, token in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    pieces = Regex("|".join((*WORDS, ".")))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pieces, behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        mask_token=MASK,
        unk_token=UNK,
        padding_side="left",
        model_max_length=MAX_PROMPT + MAX_ANSWER,
        clean_up_tokenization_spaces=False,
    )


def build_config(layers: int, width: int) -> Qwen3Config:
    """Qwen3 with grouped queries: SDAR's architecture, small."""
    return Qwen3Config(
        vocab_size=len(VOCABULARY),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 64,
        head_dim=32,
        max_position_embeddings=MAX_PROMPT + MAX_ANSWER,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        initializer_range=0.04,
        tie_word_embeddings=True,
        pad_token_id=VOCABULARY.index(PAD),
        eos_token_id=VOCABULARY.index(EOS),
        bos_token_id=None,
        block_length=BLOCK_LENGTH,
        mask_token_id=VOCABULARY.index(MASK),
    )


def build_model(layers: int, width: int) -> Qwen3ForCausalLM:
    """A fresh model whose residual stream starts as the token, not as an average of all tokens.

    With Qwen3's own initialisation the output of the first attention is several times larger than
    a token's embedding, and look-ups had not emerged after 440 autoregressive steps.
    """
    model = Qwen3ForCausalLM(build_config(layers, width))
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_(0.0, 0.1)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(0.25)
            layer.mlp.down_proj.weight.mul_(0.25)
    return model
