"""A model for lm-evaluation-harness, named ``focus``; extra ``[eval]``.

    python -m focus_compile.lm_eval --model focus --model_args pretrained=PATH --tasks gsm8k

is the harness's own command line with this model added. In a program, import this module before
``lm_eval.simple_evaluate(model="focus", ...)``.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NoReturn

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import Collator, normalize_gen_kwargs, postprocess_generated_text
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from focus_compile.entry import compile as compile_model
from focus_compile.generation.loop import generate
from focus_compile.generation.text import answers, end_tokens, left_padded, prompt_ids
from focus_compile.log import warning_once
from focus_compile.models.load import load
from focus_compile.models.mask_token import find_mask_token
from focus_compile.runtime.session import session

__all__ = ["FocusLM"]

log = logging.getLogger(__name__)

GENERATION = ("temperature", "top_k", "top_p")
"""What of a task's ``generation_kwargs`` goes to :func:`~focus_compile.generate`; lengths and stop
strings have arguments of their own, and ``do_sample=False`` is temperature 0."""

DECODING = (
    "confidence_threshold",
    "remasking_strategy",
    "denoising_steps",
    "tokens_per_step",
    "shifted_logits",
    "use_cache",
    "seed",
    "eos_early_stop",
    "pad_token_id",
)
"""Arguments of :func:`~focus_compile.generate` that ``model_args`` may hold."""


@register_model("focus")
class FocusLM(TemplateLM):  # type: ignore[misc]
    """A block-diffusion LLM compiled with FOCUS; answers ``generate_until`` tasks in batches.

    One process; no likelihoods. ``results["config"]`` of an evaluation tells what ran: forwards,
    those of FOCUS among them, and the shares of tokens that were fed and retained.

    Args:
        pretrained: a model's folder or name, ``module:function`` that returns a model (such as one
            whose checkpoint brings its own code), or a model; the last two need ``tokenizer``.
        tokenizer: a folder or name, or a tokenizer; by default that of ``pretrained``.
        focus: False decodes densely, by the graphs that plain Inductor runs.
        alpha: the budget factor, see :func:`~focus_compile.session`.
        batch_size: prompts per batch; ``"auto"`` is not known.
        max_batch_size: ignored; the harness gives it to every model, for ``"auto"``.
        max_length: most tokens of prompt and answer, by default the model's position limit; longer
            prompts lose their beginning, with a warning.
        max_gen_toks: most tokens of an answer, where a task does not say.
        mask_token_id: by default looked up, as :func:`~focus_compile.compile` does.
        block_length: tokens per block; answers are made in whole blocks.
        decoding: more arguments of :func:`~focus_compile.generate`, those of ``DECODING``.

    Raises:
        ValueError: an argument is unknown or out of range, or no mask token is to be found.
        torch._dynamo.exc.BackendCompilerFailed: FOCUS refuses the model; at the first batch.
    """

    def __init__(
        self,
        pretrained: str | nn.Module,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        *,
        focus: bool = True,
        alpha: float = 1.5,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        dtype: str = "auto",
        max_length: int | None = None,
        max_gen_toks: int = 256,
        mask_token_id: int | None = None,
        block_length: int = 32,
        **decoding: Any,
    ) -> None:
        super().__init__()
        if unknown := [name for name in decoding if name not in DECODING]:
            raise ValueError(
                f"unknown model_args: {', '.join(unknown)}; a checkpoint that brings its own code "
                f"is given as module:function, and how to decode by {', '.join(DECODING)}"
            )
        model: Any = pretrained
        if isinstance(pretrained, str) and ":" in pretrained:
            model, _ = load(pretrained)
        elif isinstance(pretrained, str):
            tokenizer = pretrained if tokenizer is None else tokenizer
            model = AutoModelForCausalLM.from_pretrained(pretrained, dtype=dtype)
        if tokenizer is None:
            raise ValueError("pretrained is a model: give its tokenizer, too")
        if isinstance(tokenizer, str):
            tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        self.tokenizer = tokenizer
        self.end_ids = end_tokens(tokenizer, model)
        model = model.eval().to(device or "cpu")
        self._device = next(model.parameters()).device
        self.batch_size = _positive("batch_size", 16 if batch_size is None else batch_size)
        self.max_gen_toks = _positive("max_gen_toks", max_gen_toks)
        config: Any = getattr(model, "config", None)
        limit = max_length
        if limit is None:
            limit = getattr(config, "max_position_embeddings", None)
        self.max_length = None if limit is None else _positive("max_length", limit)
        self.mask_token_id = (
            find_mask_token(model, tokenizer) if mask_token_id is None else mask_token_id
        )
        self.block_length = _positive("block_length", block_length)
        self.focus, self.alpha = focus, alpha
        self.decoding = decoding | {"block_length": self.block_length}
        self.model = compile_model(
            model, mask_token_id=self.mask_token_id, dynamic=True, strict=True
        )
        self.ran: defaultdict[str, float] = defaultdict(float)

    @property
    def tokenizer_name(self) -> str:
        """For the harness's cache of requests with chat templates."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    @property
    def eot_token_id(self) -> int:
        """Id of the (first) end of text.

        Raises:
            ValueError: neither the tokenizer nor the model has one.
        """
        if not self.end_ids:
            raise ValueError("neither the tokenizer nor the model names an end of text")
        return self.end_ids[0]

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Ids of a text; by default with a beginning of text, but never twice."""
        if add_special_tokens is None:
            return prompt_ids(self.tokenizer, string)
        ids: list[int] = self.tokenizer.encode(string, add_special_tokens=add_special_tokens)
        return ids

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as the prompt that the tokenizer's template makes of it."""
        text: Any = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return str(text)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> NoReturn:
        """Refused.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "block diffusion decodes in an order that confidence chooses: a text has no likelihood "
            "token by token; take tasks whose output_type is generate_until"
        )

    loglikelihood_rolling = loglikelihood
    _loglikelihood_tokens = loglikelihood

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers to ``(context, generation_kwargs)``, in the order of ``requests``.

        An answer ends at the first of the task's ``until`` strings (special tokens' among them), at
        an end of text (:func:`~focus_compile.generation.text.end_tokens`), or after
        ``max_gen_toks`` tokens. Prompts of about one length share a batch; a batch goes on, block
        by block, until its last row has ended.
        """
        sorted_requests = Collator(
            [request.args for request in requests],
            sort_fn=lambda args: (-len(self.tok_encode(args[0])), args[0]),
            group_by="gen_kwargs",
            group_fn=lambda args: args[1],
        )
        responses: list[str] = []
        batches = list(sorted_requests.get_batched(n=self.batch_size))
        for batch in track(
            batches, "generate_until", console=Console(stderr=True), disable=disable_tqdm
        ):
            contexts, kwargs = zip(*batch, strict=True)
            texts = self._answer(contexts, kwargs[0])
            for request, answer in zip(batch, texts, strict=True):
                self.cache_hook.add_partial("generate_until", request, answer)
            responses += texts
        ordered: list[str] = sorted_requests.get_original(responses)
        return ordered

    def get_model_info(self) -> dict[str, Any]:
        """What ran, for the harness's report."""
        forwards = max(1, self.ran["forwards"])
        return {
            "focus": self.focus,
            "alpha": self.alpha,
            "mask_token_id": self.mask_token_id,
            "decoding": self.decoding,
            "forwards": self.ran["forwards"],
            "focus_forwards": self.ran["focus_forwards"],
            "fed_fraction": self.ran["fed"] / forwards,
            "retained_fraction": self.ran["retained"] / forwards,
        }

    def _answer(self, contexts: Sequence[str], gen_kwargs: dict[str, Any]) -> list[str]:
        """One batch of prompts that share their ``generation_kwargs``."""
        kwargs = normalize_gen_kwargs(gen_kwargs, self.max_gen_toks)
        stops, max_tokens = kwargs["until"], kwargs["max_gen_toks"]
        ids, attention_mask = self._encode(contexts, max_tokens)
        prompt = ids.shape[1]
        with session(self.mask_token_id, alpha=self.alpha, enabled=self.focus):
            generated = generate(
                self.model,
                ids,
                attention_mask,
                max_new_tokens=max_tokens,
                mask_token_id=self.mask_token_id,
                eos_token_id=self.end_ids,
                stop_strings=stops,
                tokenizer=self.tokenizer,
                return_dict=True,
                **{name: kwargs[name] for name in GENERATION if name in kwargs},
                **self.decoding,
            )
        if self.focus and not generated.focus_steps:
            raise RuntimeError("FOCUS did not run, every step was dense: see the warnings above")
        self.ran["forwards"] += generated.forwards
        self.ran["focus_forwards"] += generated.focus_steps
        self.ran["fed"] += generated.fed_fraction * generated.forwards
        self.ran["retained"] += generated.retained_fraction * generated.forwards
        texts = answers(self.tokenizer, generated.sequences[:, prompt : prompt + max_tokens], stops)
        return [postprocess_generated_text(text, stops, None) for text in texts]

    def _encode(self, contexts: Sequence[str], max_tokens: int) -> tuple[Tensor, Tensor]:
        """Ids and attention mask ``[B, P]``, padded on the left, cut to leave room for answers."""
        new_tokens = -(-max_tokens // self.block_length) * self.block_length
        room = None if self.max_length is None else self.max_length - new_tokens
        if room is not None and room < 1:
            raise ValueError(
                f"max_gen_toks={max_tokens}: the model has {self.max_length} positions"
            )
        ids, attention_mask = left_padded([self.tok_encode(context) for context in contexts])
        ids, attention_mask = ids.to(self.device), attention_mask.to(self.device)
        if room is not None and ids.shape[1] > room:
            warning_once(log, "prompts of more than %d tokens lose their beginning", room)
            ids, attention_mask = ids[:, -room:], attention_mask[:, -room:]
        return ids, attention_mask


def _positive(name: str, value: Any) -> int:
    if not str(value).isdigit() or not int(value):
        raise ValueError(f"{name}={value!r}: expected at least 1")
    return int(value)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
