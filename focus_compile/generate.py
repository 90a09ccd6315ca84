"""Block diffusion over a Hugging Face cache: the denoising loop, for eager and compiled models."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from functools import partial
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from focus_compile.ambient import inside, open_elsewhere
from focus_compile.backend import focus_backend
from focus_compile.compile import Backend, check_mask_token
from focus_compile.decoding import Decoder, Strategy, count_per_step, warpers
from focus_compile.generated import Generated
from focus_compile.rows import Canvas, Rows
from focus_compile.session import Session, current_session, warn_outside
from focus_compile.shards import is_sharded
from focus_compile.torch_private import backend_of

__all__ = ["generate"]

EAGER = (
    "backend 'focus' was not called: Dynamo ran the model eagerly, for its recompile limit is "
    "reached (torch._dynamo.config.recompile_limit), or it is switched off. Compile with "
    "focus_compile.compile(...), which has a limit of its own, vary alpha by session(alpha=...), "
    "or raise the limit"
)


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
    logits_processor: LogitsProcessorList | None = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    generator: torch.Generator | None = None,
    seed: int | None = None,
    progress: bool = False,
    return_dict: bool = False,
) -> Tensor | Generated:
    """Generate text block by block with a block-diffusion LLM.

    Works alike for an eager model, ``torch.compile(model)`` and ``torch.compile(model,
    backend="focus")``. Every forward gets a mask ``[B, 1, T, S + T]`` (bool, or additive where the
    model's attention is transformers' eager one) that hides left padding only: the prompt attends
    to itself in both directions, a block to the history and to itself. Blocks are in lockstep; a
    row that has ended stays in the batch, idle. Runs in a session of its own, which takes alpha,
    visibility, signal and enabled from the session around it.

    Args:
        input_ids: int64 ``[B, P]``, prompts padded on the left; attention_mask: ``[B, P]``, 0 at
            padding.
        max_new_tokens: rounded up to whole blocks of ``block_length``.
        remasking_strategy: ``"threshold"``: decode every token of confidence >=
            ``confidence_threshold``, or else the most confident one; ``"fixed"``: the
            ``tokens_per_step`` most confident ones; ``"sequential"``: the leftmost ones. Or a
            function, :data:`~focus_compile.decoding.Strategy`, of the step's candidates.
        denoising_steps: sets ``tokens_per_step`` to ``ceil(block_length / denoising_steps)``.
        temperature: 0 decodes greedily; else tokens are sampled, after ``top_k`` and ``top_p``,
            with ``generator`` or with one made from ``seed``. The mask token is never decoded.
        eos_token_id: one id or several; ends a row; ``eos_early_stop=False`` goes on to the end of
            the last block. What follows an end of text is filled with ``pad_token_id``, by default
            the (first) end of text.
        shifted_logits: the model predicts the token at p by the logits of p - 1 (Dream): a token
            can be decoded where its left neighbour was retained.
        use_cache: False for models without a cache (LLaDA, Dream as published): they are called
            with the prompt and all blocks, ``input_ids`` ``[B, P + new]`` alone, or, where prompts
            are padded, with a bool ``attention_mask`` ``[B, 1, P + new, P + new]`` and
            ``position_ids`` too. With FOCUS, what is not in the block at hand keeps the keys and
            values that it had when the block began (docs/models.md).
        streamer: gets the prompt, then each committed block, as from transformers (whose own
            streamers take one row). progress: show a bar.

    Returns:
        sequences int64 ``[B, P + new]``, or :class:`Generated`.

    Raises:
        RuntimeError: the model is compiled with backend "focus", but Dynamo ran it eagerly.
        ValueError: an argument is out of range, or tokens are drawn from a model that is sharded
            over processes, with neither ``seed`` nor ``generator``.
    """
    _check(input_ids, attention_mask, max_new_tokens, block_length)
    if temperature > 0 and seed is None and generator is None and is_sharded(model):
        raise ValueError("the model is sharded over processes, which must draw alike: give seed")
    decoder = Decoder(
        remasking_strategy,
        confidence_threshold,
        count_per_step(block_length, denoising_steps, tokens_per_step),
        warpers(logits_processor, mask_token_id, temperature, top_k, top_p, input_ids.device),
        temperature > 0,
        _generator(generator, seed, input_ids.device),
    )
    ends = _ends(eos_token_id, input_ids.device)
    pad = int(ends[0]) if pad_token_id is None and len(ends) else pad_token_id
    fill = mask_token_id if pad is None else pad
    valid = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    blocks = -(-max_new_tokens // block_length)
    rows: Rows | Canvas
    if use_cache:
        rows = Rows(model, input_ids, valid.bool())
    else:
        masks = input_ids.new_full((len(input_ids), blocks * block_length), mask_token_id)
        rows = Canvas(model, input_ids, valid.bool(), masks)
    result = Generated(input_ids)
    if streamer is not None:
        streamer.put(input_ids.cpu())  # type: ignore[no-untyped-call]
    check_mask_token(model, mask_token_id)
    backend = backend_of(model)
    request = _session(mask_token_id, shifted_logits)
    with closing(request) as focus, Progress(disable=not progress, transient=True) as bar:
        focus.commits_exactly, focus.owns_kv = use_cache, True
        focus.masked = torch.zeros_like(input_ids, dtype=torch.bool)
        with inside(focus):
            last = rows.prefill()
        task = bar.add_task("blocks", total=blocks)
        for _ in range(blocks):
            block, masked = rows.open_block(block_length, mask_token_id, fill)
            focus.block = rows.block
            block = _denoise(rows, decoder, focus, result, block=block, masked=masked, last=last)
            _account(request, backend, result.forwards)
            focus.masked = torch.zeros_like(masked)
            with inside(focus):
                last = rows.commit(block)
            done = _after_end(rows.sequences, input_ids.shape[1], ends, fill)
            if streamer is not None:
                streamer.put(done[:, -block_length:].cpu())  # type: ignore[no-untyped-call]
            made = rows.sequences[:, -block_length:]
            _stop(rows, made, ends if eos_early_stop else ends[:0], stopping_criteria)
            bar.advance(task)
            if not bool(rows.active.any()):
                break
        if focus.stats.canvas:
            result.fed_fraction = focus.stats.fed_fraction
            result.retained_fraction = focus.stats.retained_fraction
            result.fed_per_step = focus.stats.fed_per_step
    if streamer is not None:
        streamer.end()  # type: ignore[no-untyped-call]
    result.sequences = done
    return result if return_dict else result.sequences


def _denoise(
    rows: Rows | Canvas,
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
    while bool(masked.any()):
        steps += masked.any(1)
        focus.masked, focus.logits = masked, None
        before = focus.reached
        with inside(focus):
            canvas = rows.peek(block)
        focus.eager += focus.reached == before
        if focus.logits is None:
            values, row = canvas.flatten(0, 1), torch.arange(masked.numel(), device=masked.device)
            row = row.view(masked.shape)
        else:
            packed = focus.logits
            result.retain_masks.append(focus.retain_mask)
            values = packed.values
            row = torch.full(masked.shape, -1, device=masked.device)
            row[packed.rows, packed.positions] = torch.arange(len(values), device=masked.device)
        if focus.shifted_logits:
            edge = torch.full_like(row[:, :1], -1)
            if last is not None:
                edge[:, 0] = len(values) + torch.arange(len(last), device=row.device)
                values = torch.cat([values, last])
            row = torch.cat([edge, row[:, :-1]], 1)
        where = masked & (row >= 0)
        scores = values[row[where]]
        chosen, tokens = decoder.step(scores, where, rows.sequences)
        block = torch.where(chosen, tokens, block)
        masked = masked & ~chosen
        result.forwards += 1
        result.decode_masks.append(chosen)
        result.decoded += int(chosen.sum())
    result.steps_per_block.append(steps)
    return block


def _account(request: Session, backend: Any, masked_calls: int) -> None:
    """Compare the masked calls so far with those that FOCUS computed.

    Raises:
        RuntimeError: the model is compiled with FOCUS, but Dynamo ran it eagerly.
    """
    missed = masked_calls - request.stats.steps - request.stats.masked_dense
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


def _session(mask_token_id: int, shifted_logits: bool) -> Session:
    """A request's own session, with the settings of the one around it."""
    around = current_session()
    if around is None:
        if not all(found.is_plain for found in open_elsewhere()):
            warn_outside()
        around = Session()
    around.reached += 1
    return Session(
        mask_token_id,
        around.alpha,
        around.visibility,
        around.signal,
        "packed",
        around.enabled,
        shifted_logits,
    )


def _check(ids: Tensor, valid: Tensor | None, new: int, block: int) -> None:
    if ids.dim() != 2 or ids.shape[0] == 0 or ids.shape[1] == 0:
        raise ValueError(
            f"input_ids has shape {tuple(ids.shape)}: expected [batch, prompt], not empty"
        )
    if valid is not None and valid.shape != ids.shape:
        raise ValueError(
            f"attention_mask has shape {tuple(valid.shape)}: input_ids has {tuple(ids.shape)}"
        )
    if valid is not None and not bool(valid[:, -1].all()):
        raise ValueError("attention_mask ends with 0: expected prompts padded on the left")
    if new < 1 or block < 1:
        raise ValueError(f"max_new_tokens={new}, block_length={block}: expected at least 1")


def _generator(
    given: torch.Generator | None, seed: int | None, device: torch.device
) -> torch.Generator | None:
    if seed is None:
        return given
    if given is not None:
        raise ValueError("give seed or generator, not both")
    return torch.Generator(device).manual_seed(seed)


def _ends(eos: int | Sequence[int] | None, device: torch.device) -> Tensor:
    """Ids that end a text, int64 ``[E]``."""
    ids = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    return torch.tensor(ids, dtype=torch.int64, device=device)


def _stop(
    rows: Rows | Canvas, block: Tensor, ends: Tensor, criteria: StoppingCriteriaList | None
) -> None:
    """Mark rows that have ended."""
    rows.active = rows.active & ~torch.isin(block, ends).any(1)
    if criteria:
        none: Any = None
        rows.active = rows.active & ~criteria(rows.sequences, none)


def _after_end(sequences: Tensor, prompt: int, ends: Tensor, fill: int) -> Tensor:
    """Replace what follows the first end of text of an answer."""
    answer = sequences[:, prompt:]
    end = torch.isin(answer, ends).long()
    after = end.cumsum(1) - end > 0
    return torch.cat([sequences[:, :prompt], answer.masked_fill(after, fill)], 1)
