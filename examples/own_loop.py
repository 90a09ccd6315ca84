"""A denoising loop of your own, with FOCUS: the whole of it, to copy.

    python examples/own_loop.py

Apart from the session, this is the loop of any block-diffusion LLM that decodes by confidence.
FOCUS asks three things of it:

- decode only positions of ``focus.retain_mask``: the others were evicted, their logits are zeros;
- put the cache back after a call with masks: the keys and values of evicted tokens are not in it;
- commit: when a block has no mask left, call once more, and keep that call's keys and values.

The session is told the loop's threshold: where no retained token of a row reaches it, the evicted
ones are computed in the same step, and nothing is decoded for want of something better.

A batch needs prompts of one length here. ``focus_compile.generate`` is this loop with padding, ends
of text, sampling and streaming.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, DynamicCache, Qwen3ForCausalLM

import focus_compile

CHECKPOINT = Path(__file__).resolve().parent / "tiny_dllm" / "aligned_checkpoint"
PROMPT = (  # follow the pairs from k: k6, 6m, mr, ...
    "chain:k|d9;n5;fj;p8;xz;57;ag;r3;0y;8l;zi;e2;6m;hq;ib;mr;40;"
    "js;q4;ce;of;wh;3n;vx;2p;ta;bc;7o;k6;lv;gd;yw;st;="
)
BLOCK, THRESHOLD = 32, 0.9


@torch.no_grad()
def my_denoising_loop(
    model: Any, ids: Tensor, blocks: int, mask: int, focus: focus_compile.Session
) -> Tensor:
    """The answers ``[B, blocks * BLOCK]`` to prompts ``ids`` ``[B, P]``."""
    cache = DynamicCache(config=model.config)

    def forward(tokens: Tensor) -> Tensor:
        start = cache.get_seq_length()
        stop = start + tokens.shape[1]
        # everything sees everything: a mask that is missing or 2-D would become a causal one
        visible = torch.ones(len(tokens), 1, tokens.shape[1], stop, dtype=torch.bool)
        places = torch.arange(start, stop).expand(len(tokens), -1)
        # the fourth is past_key_values, or cache from transformers 5.24 on
        return model(tokens, visible, places, cache, use_cache=True).logits

    forward(ids)  # the prompt: no masks, so this runs dense
    for layer in cache.layers:  # laid out as later blocks will be: one graph less to compile
        layer.keys, layer.values = layer.keys.contiguous(), layer.values.contiguous()
    answers = []
    for _ in range(blocks):
        block = torch.full((len(ids), BLOCK), mask)
        before = [(layer, layer.keys, layer.values) for layer in cache.layers]
        while bool((masked := block == mask).any()):
            scores = forward(block).softmax(-1)
            for layer, keys, values in before:  # what cache.crop does, with one layout
                layer.keys, layer.values = keys, values
            scores[..., mask] = 0  # a mask is never decoded
            confidence, tokens = scores.max(-1)
            if focus.retain_mask is not None:  # None: every call ran dense
                masked = masked & focus.retain_mask
            confidence = confidence.masked_fill(~masked, -1)
            surest = confidence.amax(1, keepdim=True)  # decoded where none is sure enough
            sure = masked & (confidence >= surest.clamp(max=THRESHOLD))
            block = torch.where(sure, tokens, block)
        forward(block)  # the commit: no masks, dense, and the cache keeps it
        answers.append(block)
    return torch.cat(answers, 1)


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    model = Qwen3ForCausalLM.from_pretrained(CHECKPOINT).eval()
    compiled = focus_compile.compile(model, tokenizer, dynamic=True, strict=True)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    with focus_compile.session(rescue=THRESHOLD) as focus:
        made = my_denoising_loop(compiled, ids, 1, tokenizer.mask_token_id, focus)
        stats = focus.stats
    print(tokenizer.decode(made[0], skip_special_tokens=True))
    print(
        f"{stats.steps} steps; layers from 2 on computed {stats.retained_fraction:.0%} of the block"
    )


if __name__ == "__main__":
    main()
