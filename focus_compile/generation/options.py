"""The keywords of ``generate`` as types, so that ``return_dict`` tells what it returns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Required, TypedDict

import torch
from transformers import LogitsProcessor, PreTrainedTokenizerBase, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from focus_compile.generation.decoding import Strategy

__all__ = ["Options"]


class Options(TypedDict, total=False):
    """What :func:`~focus_compile.generation.loop.generate` says of each of them."""

    max_new_tokens: Required[int]
    mask_token_id: Required[int]
    block_length: int
    remasking_strategy: str | Strategy
    confidence_threshold: float
    denoising_steps: int | None
    tokens_per_step: int | None
    temperature: float
    top_k: int | None
    top_p: float | None
    eos_token_id: int | Sequence[int] | None
    pad_token_id: int | None
    eos_early_stop: bool
    shifted_logits: bool
    use_cache: bool
    streamer: BaseStreamer | None
    logits_processor: Sequence[LogitsProcessor] | None
    stopping_criteria: StoppingCriteria | Sequence[StoppingCriteria] | None
    stop_strings: str | Sequence[str] | None
    tokenizer: PreTrainedTokenizerBase | None
    generator: torch.Generator | None
    seed: int | None
    rescue: float | Literal["auto"] | None
    first_step: str | None
    evict: bool | str | None
    progress: bool
