"""diffusers' pipelines for diffusion LLMs, with FOCUS in place of their models.

    pip install -e '.[diffusers]' && python examples/diffusers_pipelines.py

Two tiny models with random weights answer with noise: this shows where ``torch.compile`` goes, how
the session learns which tokens are open, and how much is computed. ``INNER`` leaves Inductor out,
whose compilation takes minutes: without it, ``backend="focus"`` is all there is to say.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from diffusers import BlockRefinementScheduler, DiffusionGemmaPipeline, LLaDA2Pipeline
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.models.diffusion_gemma import (
    DiffusionGemmaConfig,
    DiffusionGemmaForBlockDiffusion,
    DiffusionGemmaTextConfig,
)

import focus_compile


def _as_it_is(graph: Any, inputs: Any) -> Any:
    return graph


INNER: Callable[..., Any] | None = _as_it_is
VOCABULARY, MASK, BLOCK = 61, 60, 16
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 48, "intermediate_size": 96, "head_dim": 16}
SIZES |= {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}


class Masked(nn.Module):
    """A model that LLaDA2Pipeline can call: ``[B, T]`` ids, a 2-D mask, logits of all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Qwen3ForCausalLM(Qwen3Config(**SIZES, initializer_range=0.3))
        never = torch.zeros(VOCABULARY)
        never[MASK] = -1e4  # a trained model does not answer with its mask token
        self.register_buffer("never", never)

    @property
    def device(self) -> torch.device:
        return self.never.device

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Any:
        rows, tokens = input_ids.shape
        visible = attention_mask.bool()[:, None, None, :].expand(rows, 1, tokens, tokens)
        out = self.inner(input_ids, visible, position_ids, use_cache=False)
        out.logits = out.logits + self.never
        return out


def masked_pipeline() -> LLaDA2Pipeline:
    """Blocks of mask tokens; tokens that were decoded may be edited."""
    torch.manual_seed(0)
    pipe = LLaDA2Pipeline(Masked().eval(), BlockRefinementScheduler(block_length=BLOCK))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noised_pipeline() -> DiffusionGemmaPipeline:
    """A canvas of random tokens, drawn anew where nothing is decoded yet."""
    text = DiffusionGemmaTextConfig(
        **SIZES,
        global_head_dim=16,
        num_global_key_value_heads=2,
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_experts=4,
        top_k_experts=2,
        moe_intermediate_size=32,
        initializer_range=0.3,
    )
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    vision |= {"num_attention_heads": 2, "num_key_value_heads": 2, "position_embedding_size": 8}
    config = DiffusionGemmaConfig(text_config=text, vision_config=vision)
    config.canvas_length = BLOCK
    torch.manual_seed(0)
    # the eager experts read their counts on the host, which breaks the graph
    model = DiffusionGemmaForBlockDiffusion._from_config(
        config, experts_implementation="grouped_mm"
    )
    _take_past_key_values(model.model.decoder)
    scheduler = BlockRefinementScheduler(block_length=BLOCK)
    pipe = DiffusionGemmaPipeline(model.eval(), scheduler, Processor())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _take_past_key_values(decoder: Any) -> None:
    """diffusers 0.42 passes an argument that transformers 5.24 has renamed to ``cache``."""
    make = decoder.create_diffusion_decoder_attention_mask
    if "cache" in inspect.signature(make).parameters:
        decoder.create_diffusion_decoder_attention_mask = lambda past_key_values, **given: make(
            cache=past_key_values, **given
        )


class Processor:
    """In place of a tokenizer: prompts of seven tokens."""

    eos_token_id = None

    def apply_chat_template(self, messages: list[Any], **_: Any) -> dict[str, Tensor]:
        ids = prompts(len(messages))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def prompts(rows: int) -> Tensor:
    return torch.randint(0, MASK, (rows, 7), generator=torch.Generator().manual_seed(1))


def answer_masked(pipe: LLaDA2Pipeline, focus: focus_compile.Session | None = None) -> Tensor:
    """Answers ``[2, 32]``. The session finds masks by their token, and is told of edits.

    It is asked, too, whether a decoded token was evicted: after the last step of a block no other
    call would tell.
    """

    def decoded(pipe: Any, step: int, timestep: int, tensors: dict[str, Tensor]) -> dict[str, Any]:
        if focus is not None and focus.retain_mask is not None:
            assert not (tensors["transfer_index"] & ~focus.retain_mask[:, -BLOCK:]).any()
            before = tensors["block_x"].shape[1] - BLOCK
            focus.edited = F.pad(tensors["editing_transfer_index"], (before, 0))
        return {}

    return pipe(
        input_ids=prompts(2),
        gen_length=32,
        block_length=BLOCK,
        num_inference_steps=8,
        threshold=0.9,
        editing_threshold=0.3,
        sampling_method="greedy",
        mask_token_id=MASK,
        eos_early_stop=False,
        output_type="seq",
        callback_on_step_end=decoded,
        callback_on_step_end_tensor_inputs=["block_x", "transfer_index", "editing_transfer_index"],
    ).sequences


def answer_noised(
    pipe: DiffusionGemmaPipeline, focus: focus_compile.Session | None = None
) -> Tensor:
    """Answers ``[2, 32]``. The scheduler knows which tokens are open in the next step.

    Its last step decodes whatever is left: that one runs dense.
    """

    def opened(pipe: Any, step: int, timestep: int, tensors: dict[str, Tensor]) -> dict[str, Any]:
        if focus is not None:
            last = timestep + 2 >= pipe.scheduler.num_inference_steps
            focus.masked = ~pipe.scheduler._committed & (not last)
        return {}

    return pipe(
        prompt=["one", "two"],
        gen_length=32,
        num_inference_steps=8,
        output_type="seq",
        generator=torch.Generator().manual_seed(3),
        callback_on_step_end=opened,
    ).sequences


def compiled(module: nn.Module, **options: Any) -> Any:
    backend = functools.partial(focus_compile.focus_backend, inner=INNER)
    return torch.compile(module, backend=backend, dynamic=True, options=options)


def main() -> None:
    pipe = masked_pipeline()
    expected = answer_masked(pipe)
    pipe.model = compiled(pipe.model, mask_token_id=MASK)
    _compare("LLaDA2Pipeline", pipe, answer_masked, expected)

    noised = noised_pipeline()
    expected = answer_noised(noised)
    noised.model.model.decoder = compiled(noised.model.model.decoder)
    _compare("DiffusionGemmaPipeline", noised, answer_noised, expected)


def _compare(name: str, pipe: Any, answer: Callable[..., Tensor], expected: Tensor) -> None:
    with focus_compile.session(exact=True) as focus:
        exact = answer(pipe, focus)
    with focus_compile.session(first_step="open", rescue=None) as focus:
        answer(pipe, focus)
    print(f"{name}: nothing evicted, same tokens: {torch.equal(exact, expected)}")
    stats = focus.stats
    print(f"  evicting: {stats.steps} steps with FOCUS, {stats.dense_calls} dense calls;", end=" ")
    print(f"layers from 2 on computed {stats.retained_fraction:.0%} of the tokens of these steps")


if __name__ == "__main__":
    main()
