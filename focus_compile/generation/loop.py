"""Block diffusion over a Hugging Face cache: the denoising loop, for eager and compiled models."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from functools import partial
from typing import Any, Literal, Unpack, overload

import torch
from rich.progress import Progress
from torch import Tensor, nn
from transformers import LogitsProcessor, PreTrainedTokenizerBase, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from focus_compile.backend import focus_backend
from focus_compile.compiling import shown
from focus_compile.config import Rescue
from focus_compile.entry import Backend
from focus_compile.generation.batch import CachedBatch, CanvasBatch
from focus_compile.generation.decoding import Decoder, Strategy, count_per_step, warpers
from focus_compile.generation.endings import Endings
from focus_compile.generation.generated import Generated
from focus_compile.generation.options import Options
from focus_compile.generation.request import (
    criteria,
    fraction,
    lengths,
    prompts,
    token_id,
    token_ids,
)
from focus_compile.generation.scores import step_scores
from focus_compile.generation.text import StopStrings
from focus_compile.graph.sharding import is_sharded
from focus_compile.models.compiled import backend_of
from focus_compile.models.vocabulary import check_ids, check_mask_token, rows_of
from focus_compile.runtime.ambient import current_session, inside, open_elsewhere
from focus_compile.runtime.reader import Reader
from focus_compile.runtime.session import Session, warn_outside
from focus_compile.runtime.statistics import SessionStats

__all__ = ["generate"]

EAGER = (
    "backend 'focus' was not called: Dynamo ran the model eagerly, for its recompile limit is "
    "reached (torch._dynamo.config.recompile_limit), or it is switched off. Compile with "
    "focus_compile.compile(...), which has a limit of its own, vary alpha by session(alpha=...), "
    "or raise the limit"
)


@overload
def generate(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    return_dict: Literal[True],
    **options: Unpack[Options],
) -> Generated: ...


@overload
def generate(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    return_dict: Literal[False] = False,
    **options: Unpack[Options],
) -> Tensor: ...


@overload
def generate(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    return_dict: bool,
    **options: Unpack[Options],
) -> Tensor | Generated: ...


@torch.no_grad()
def generate(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int,
    mask_token_id: int,
    block_length: int = 32,
    remasking_strategy: str | Strategy = "threshold",
    confidence_threshold: float = 0.9,
    denoising_steps: int | None = None,
    tokens_per_step: int | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    eos_early_stop: bool = True,
    shifted_logits: bool = False,
    use_cache: bool = True,
    streamer: BaseStreamer | None = None,
    logits_processor: Sequence[LogitsProcessor] | None = None,
    stopping_criteria: StoppingCriteria | Sequence[StoppingCriteria] | None = None,
    stop_strings: str | Sequence[str] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    generator: torch.Generator | None = None,
    seed: int | None = None,
    rescue: Rescue = "auto",
    first_step: str | None = None,
    evict: bool | str | None = None,
    progress: bool = False,
    return_dict: bool = False,
) -> Tensor | Generated:
    """Generate text block by block with a block-diffusion LLM.

    Works alike for an eager model, ``torch.compile(model)`` and ``torch.compile(model,
    backend="focus")``. Every forward gets a mask ``[B, 1, T, S + T]`` (bool, or additive where the
    model's attention is transformers' eager one) that hides left padding only: the prompt attends
    to itself in both directions, a block to the history and to itself. Blocks are in lockstep; a
    row that has ended stays in the batch, idle. Runs in a session of its own, which takes alpha,
    visibility, signal, enabled, exact, calibration and, where they are not given, rescue,
    first_step and evict from the session around it.

    Args:
        input_ids: ids ``[B, P]``, prompts padded on the left; attention_mask: ``[B, P]``, 0 at
            padding. A mask token in a prompt is a part of it, and stays.
        max_new_tokens: rounded up to whole blocks of ``block_length``.
        remasking_strategy: ``"threshold"``: decode every token of confidence >=
            ``confidence_threshold``, or else the most confident one; ``"fixed"``: the
            ``tokens_per_step`` most confident ones; ``"sequential"``: the leftmost ones. Or a
            function, :data:`~focus_compile.generation.decoding.Strategy`, of the step's candidates.
        denoising_steps: sets ``tokens_per_step`` to ``ceil(block_length / denoising_steps)``.
        temperature: 0 decodes greedily; else tokens are sampled, after ``top_k`` (0 or -1: off)
            and ``top_p`` (1: off), with ``generator`` or with one made from ``seed``. The mask
            token is never decoded.
        eos_token_id: one id or several; ends a row; ``eos_early_stop=False`` goes on to the end of
            the last block. What follows the end of a row is filled with ``pad_token_id``, by
            default the (first) end of text, or else the mask token.
        stopping_criteria: one or several, as of transformers; each sees a row after each of its
            tokens, from left to right, as if they had come one by one; ``scores`` are None.
        stop_strings: end a row, too, behind the token that completes one of them in the answer's
            text, special tokens included; they need ``tokenizer``.
        shifted_logits: the model predicts the token at p by the logits of p - 1 (Dream): a token
            can be decoded where its left neighbour was retained.
        rescue: a row in which no retained token has this probability gets its evicted tokens
            computed in the same step, and decides among all (docs/algorithm.md section 11).
            ``"auto"``: as in the session around it, or in the model's options; where these say
            ``"auto"``, too, ``confidence_threshold`` if that is the strategy. None: never.
        first_step: ``"evict"``, ``"open"`` or ``"auto"`` (section 10); evict: True, False or
            ``"auto"`` (section 16). None: as in the session around it, or in the model's options.
        use_cache: False for models without a cache (LLaDA, Dream as published): they are called
            with the prompt and all blocks, ``input_ids`` ``[B, P + new]``, and with those of
            these that their forward takes, whether or not prompts are padded: ``attention_mask``,
            as above, or LLaDA's ``attention_bias``, additive, ``[B, 1, P + new, P + new]``;
            ``position_ids``. With FOCUS, what is not in the block at hand keeps the keys and
            values that it had when the block began (docs/models.md).
        streamer: gets the prompt, then each committed block, as from transformers (whose own
            streamers take one row); nothing behind the end of the longest row. progress: show a
            bar.

    Returns:
        sequences int64 ``[B, P + new]``, or :class:`Generated`.

    Raises:
        ValueError: an argument is out of range; tokens are drawn from a model that is sharded over
            processes, with neither ``seed`` nor ``generator``; or prompts are padded, and a model
            without a cache sees their padding (it has no mask, or ignores it).
        RuntimeError: the model is compiled with backend "focus", but Dynamo ran it eagerly.
    """
    input_ids, valid = prompts(input_ids, attention_mask)
    mask_token_id = token_id("mask_token_id", mask_token_id)
    check_mask_token(mask_token_id, rows_of(model))
    check_ids(input_ids, rows_of(model))
    max_new_tokens, block_length = lengths(max_new_tokens, block_length)
    temperature = fraction("temperature", temperature)
    if temperature > 0 and seed is None and generator is None and is_sharded(model):
        raise ValueError("the model is sharded over processes, which must draw alike: give seed")
    decoder = Decoder(
        remasking_strategy,
        fraction("confidence_threshold", confidence_threshold),
        count_per_step(block_length, denoising_steps, tokens_per_step),
        warpers(logits_processor, temperature, top_k, top_p),
        mask_token_id,
        temperature > 0,
        _generator(generator, seed, input_ids.device),
    )
    ends = token_ids("eos_token_id", eos_token_id)
    pad = token_ids("pad_token_id", pad_token_id) or ends
    fill = pad[0] if pad else mask_token_id
    stops = None if not stop_strings else StopStrings(tokenizer, stop_strings)
    endings = Endings(input_ids, ends, eos_early_stop, criteria(stopping_criteria), stops)
    blocks = -(-max_new_tokens // block_length)
    masks = input_ids.new_full((len(input_ids), blocks * block_length), mask_token_id)
    rows = _rows(model, input_ids, valid.bool(), masks, use_cache)
    result = Generated(input_ids)
    if streamer is not None:
        streamer.put(input_ids.cpu())  # type: ignore[no-untyped-call]
    backend = backend_of(model)
    request = _session(mask_token_id, shifted_logits, first_step, rescue, evict)
    request.decoding = decoder.demand
    with (
        closing(request) as focus,
        Progress(disable=not progress, transient=True) as bar,
        shown(bar, task := bar.add_task("blocks", total=blocks)),
    ):
        focus.commits_exactly, focus.owns_kv = use_cache, True
        focus.masked, focus.any_masked = torch.zeros_like(input_ids, dtype=torch.bool), False
        with inside(focus):
            last = rows.prefill()
        for _ in range(blocks):
            block, masked = rows.open_block(block_length, mask_token_id, fill)
            focus.block = rows.block
            block = _denoise(rows, decoder, focus, result, block=block, masked=masked, last=last)
            _account(request, backend, result)
            focus.masked, focus.any_masked = torch.zeros_like(masked), False
            with inside(focus):
                last = rows.commit(block)
            rows.active = endings.observe(rows.sequences, rows.active, block_length)
            done = endings.filled(rows.sequences, fill)
            start, end = done.shape[1] - block_length, endings.longest(done.shape[1])
            if streamer is not None and end > start:
                streamer.put(done[:, start:end].cpu())  # type: ignore[no-untyped-call]
            bar.advance(task)
            if not bool(rows.active.any()):
                break
        _shares(result, focus.stats)
    if streamer is not None:
        streamer.end()  # type: ignore[no-untyped-call]
    result.sequences = done
    return result if return_dict else result.sequences


def _shares(result: Generated, stats: SessionStats) -> None:
    """Note the shares of tokens that were computed, where FOCUS ran."""
    if stats.canvas:
        tokens = sum(mask.numel() for mask in result.decode_masks)
        evicted = int((~torch.stack(result.retain_masks)).sum())
        result.fed_fraction = 1 - (stats.canvas - stats.fed) / tokens
        result.retained_fraction = 1 - evicted / tokens
        result.fed_per_step = stats.fed_per_step


def _rows(
    model: nn.Module, ids: Tensor, valid: Tensor, masks: Tensor, use_cache: bool
) -> CachedBatch | CanvasBatch:
    """The batch: over a cache, or a canvas that ends with the masks of all blocks."""
    if use_cache:
        return CachedBatch(model, ids, valid, masks.shape[1])
    return CanvasBatch(model, ids, valid, masks)


def _denoise(
    rows: CachedBatch | CanvasBatch,
    decoder: Decoder,
    focus: Session,
    result: Generated,
    *,
    block: Tensor,
    masked: Tensor,
    last: Tensor | None,
) -> Tensor:
    """Decode every mask of a block; the cache is as it was.

    ``block``, ``masked``: what the model is fed, ``[B, T]``; ``last``: logits of the token before
    the block, ``[B, V]``, or None where it is fed with the block.
    """
    steps = torch.zeros_like(rows.active, dtype=torch.int64)
    count, reader = steps.new_zeros(()), Reader(rows.model)
    focus.last = last
    while bool(masked.any()):
        steps += masked.any(1)
        made = step_scores(partial(_peek, rows, block, focus), masked, focus, reader)
        if made.retained is not None:
            result.focus_steps += 1
        elif not focus.enabled:
            result.focus_steps = 0  # dense from now on, if not from the start
        whole, none = torch.ones_like(masked), torch.zeros_like(masked)
        result.retain_masks.append(whole if made.retained is None else made.retained)
        result.rescue_masks.append(none if focus.rescue_mask is None else focus.rescue_mask)
        if focus.shifted_logits:
            made = made.shifted(last)
        where = masked & (made.row >= 0)
        row, position = where.nonzero().unbind(1)
        scores = made.values[made.row[row, position]]
        chosen, tokens = decoder.step(scores, where, rows.sequences[row])
        block = torch.where(chosen, tokens, block)
        masked = masked & ~chosen
        result.forwards += 1
        result.decode_masks.append(chosen)
        count += chosen.sum()
    result.decoded += int(count)
    result.steps_per_block.append(steps)
    return block


def _peek(rows: CachedBatch | CanvasBatch, block: Tensor, focus: Session) -> Tensor:
    """A masked call, and whether it reached a program of ours."""
    before = focus.reached
    with inside(focus):
        canvas = rows.peek(block)
    focus.eager += focus.reached == before
    return canvas


def _account(request: Session, backend: Any, result: Generated) -> None:
    """Compare the denoising forwards so far with those that FOCUS computed.

    Raises:
        RuntimeError: the model is compiled with FOCUS, but Dynamo ran it eagerly.
    """
    missed = result.forwards - result.focus_steps - request.stats.masked_dense
    request.stats.masked_dense += missed
    if not missed or not _is_focus(backend):
        return
    why = "Dynamo ran the model eagerly" if request.eager else "the graph was refused"
    why = why if request.enabled else "FOCUS was off"
    if isinstance(backend, Backend):
        backend.record.dense_call(why, missed)
    if request.eager:
        raise RuntimeError(EAGER)


def _is_focus(backend: Any) -> bool:
    while isinstance(backend, partial):
        backend = backend.func
    return backend is focus_backend or isinstance(backend, Backend)


def _session(
    mask_token_id: int,
    shifted_logits: bool,
    first_step: str | None,
    rescue: Rescue,
    evict: bool | str | None,
) -> Session:
    """A request's own session, with the settings of the one around it where it has none."""
    around = current_session()
    if around is None:
        if not all(found.is_plain for found in open_elsewhere()):
            warn_outside()
        around = Session()
    around.reached += 1
    return around.request(
        mask_token_id=mask_token_id,
        logits="packed",
        shifted_logits=shifted_logits,
        first_step=first_step or around.first_step,
        evict=around.evict if evict is None else evict,
        rescue=around.rescue if rescue == "auto" else rescue,
    )


def _generator(
    given: torch.Generator | None, seed: int | None, device: torch.device
) -> torch.Generator | None:
    if seed is None:
        return given
    if given is not None:
        raise ValueError("give seed or generator, not both")
    return torch.Generator(device).manual_seed(seed)
