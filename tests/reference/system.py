"""The eager FOCUS step for one row of one block (docs/algorithm.md, sections 0-6 and 10-12).

Nothing is batched, padded or compiled: evicted tokens are simply not computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import Qwen3ForCausalLM

from tests.reference import algorithm, qwen3, trust
from tests.reference.qwen3 import History, dense_forward
from tests.reference.state import Config, RowState, StepResult
from tests.reference.trust import Judge

__all__ = [
    "Config",
    "History",
    "Judge",
    "RowState",
    "Signal",
    "StepResult",
    "dense_forward",
    "focus_step",
    "standalone_batch",
]

Signal = Callable[[Tensor, Tensor, list[int]], Tensor]
"""(importance at layer 0, importance at layer 1, masked positions M) -> delta, each [m]."""


@torch.no_grad()
def focus_step(
    model: Qwen3ForCausalLM,
    state: RowState,
    ids_T: Tensor,
    masked_T: Sequence[bool] | Tensor,
    history: History,
    position_ids_T: Tensor,
    visible: Tensor | None = None,
    config: Config | None = None,
    *,
    signal: Signal | None = None,
    bias_T: Tensor | None = None,
    judge: Judge | None = None,
    before_V: Tensor | None = None,
    stale: bool = True,
) -> StepResult:
    """Sections 1-6 and 10-12 for one row; updates `state`, except its averages (`RowState.record`).

    visible: [T, S + T], bool (True = visible) or additive float; None = everything.
    signal: instead of config.signal. bias_T: section 12.
    judge, before_V: what rescue and the signal "confidence" need to know of decoding, and with
    shifted logits those of the row before the block.
    stale=False: a call without a session. `state` is neither read nor changed; nothing of earlier
    steps is visible, avg = 1, progress = -1, nothing is final.
    """
    config = config or Config()
    if judge is None and (config.rescue is not None or config.signal == "confidence"):
        raise ValueError("rescue and confidences leave out the mask token: judge has its id")
    ids, masked = [int(i) for i in ids_T], [bool(m) for m in masked_T]
    if not stale:
        state = RowState.fresh(model, len(ids))
    if visible is None:
        visible = torch.ones(len(ids), history[0][0].shape[1] + len(ids), dtype=torch.bool)
    if not config.stale_kv:
        for written in (state.written01, state.written):
            written[:] = [now and final for now, final in zip(written, state.final, strict=True)]
    fed = state.processing_list(ids, masked, config.delayed_cache)
    if not fed:
        return _skipped(model, state)
    layers = model.model.layers
    hidden = qwen3.embed(model, ids_T[fed])
    tables = qwen3.rotary(model, position_ids_T[fed], hidden.dtype)
    rows_M = [row for row, p in enumerate(fed) if masked[p]]
    positions_M = [fed[row] for row in rows_M]

    def attended(
        layer: int, query: Tensor, queries: list[int], written: list[bool], last: int
    ) -> Tensor:
        bound = last if config.visibility == "prefix" else None
        (key_S, value_S), (key_T, value_T) = history[layer], state.slots[layer]
        return qwen3.attend(
            layers[layer],
            query,
            torch.cat([key_S, key_T], dim=1),
            torch.cat([value_S, value_T], dim=1),
            _bias(visible, queries, written, bound, query.dtype),
        )

    def scored(layer: int, query_HND: Tensor, key_GND: Tensor) -> Tensor:
        return algorithm.importance(
            query_HND[:, rows_M].transpose(0, 1),
            key_GND[:, rows_M].transpose(0, 1),
            layers[layer].self_attn.scaling,
            algorithm.compute_dtype(query_HND.dtype),
        )

    # Layer 0: everything for all of P.
    state.mark(state.written01, fed)
    query, key, value = qwen3.project(layers[0], hidden, tables)
    state.store(0, fed, key, value)
    importance0 = scored(0, query, key)
    hidden = qwen3.finish(layers[0], hidden, attended(0, query, fed, state.written01, fed[-1]))

    # Layer 1: q, k, v for all of P, then the decision.
    query, key, value = qwen3.project(layers[1], hidden, tables)
    state.store(1, fed, key, value)
    importance1 = scored(1, query, key)
    importances = (importance0, importance1)
    found = None if signal is None else signal(*importances, positions_M)
    delta, eviction = state.decide(
        config, fed, masked, importances, score=found, bias=bias_T, session=stale
    )

    def suffix(some: list[int], last: int) -> Tensor:
        """Layer 1's attention and what follows, for some of P; slots of the others stay stale."""
        rows = [fed.index(p) for p in some]
        part, part_tables = hidden[rows], tables.rows(rows)
        seen = attended(1, query[:, rows], some, state.written01, last)
        part = qwen3.finish(layers[1], part, seen)
        state.mark(state.written, some)
        for index in range(2, len(layers)):
            part_query, part_key, part_value = qwen3.project(layers[index], part, part_tables)
            state.store(index, some, part_key, part_value)
            seen = attended(index, part_query, some, state.written, last)
            part = qwen3.finish(layers[index], part, seen)
        return qwen3.logits(model, part)

    kept = eviction.kept
    logits = dict(zip(kept, suffix(kept, eviction.rightmost), strict=True))
    state.progress = eviction.progress
    need = trust.Need([], math.nan, False, math.inf)
    if judge is not None:
        confidence = {p: trust.sureness(row, judge.mask_id) for p, row in logits.items()}
        if config.rescue is not None:
            before = None if before_V is None else trust.sureness(before_V, judge.mask_id)
            need = trust.need(positions_M, kept, confidence, config.rescue, judge, before)
        if need.flag:
            more = dict(zip(need.evicted, suffix(need.evicted, fed[-1]), strict=True))
            logits |= more
            confidence |= {p: trust.sureness(row, judge.mask_id) for p, row in more.items()}
            after = trust.rescue(kept, need.evicted, state.written, state.progress)
            kept, state.written, state.progress = after.retained, after.written, after.progress
        state.memory = trust.remember(
            state.memory, state.steps, confidence, len(ids), judge.shifted
        )

    state.warm, state.had_masks = True, state.had_masks or any(masked)
    state.steps += 1
    state.settled = None if any(masked) else ids
    if config.delayed_cache:
        state.final = algorithm.finalise(masked, fed, state.final)
    return StepResult(
        fed=fed,
        masked=positions_M,
        retained=kept,
        k=eviction.k,
        importance0=importance0,
        importance1=importance1,
        delta=delta,
        margin=eviction.margin,
        logits=torch.stack([logits[p] for p in kept]),
        slots=state.copy_slots(),
        written01=list(state.written01),
        written=list(state.written),
        final=list(state.final),
        progress=state.progress,
        rescued=need.evicted if need.flag else [],
        c_star=need.c_star,
        need_margin=need.margin,
    )


def _bias(
    visible: Tensor, queries: list[int], written: list[bool], bound: int | None, dtype: torch.dtype
) -> Tensor:
    """Section 5, item 4: history and the written slots up to `bound`, AND the caller's mask."""
    slots = trust.visible_slots(written, bound)
    history = visible.shape[1] - len(slots)
    seen = torch.tensor([True] * history + slots)
    return qwen3.additive(visible[queries], dtype).masked_fill(~seen, -math.inf)


def _skipped(model: Qwen3ForCausalLM, state: RowState) -> StepResult:
    """Section 6, item 2: a row without masks that has been fed whole already."""
    weight = model.lm_head.weight
    nothing = weight.new_zeros(0, dtype=algorithm.compute_dtype(weight.dtype))
    return StepResult(
        fed=[],
        masked=[],
        retained=[],
        k=0,
        importance0=nothing,
        importance1=nothing,
        delta=nothing,
        margin=math.inf,
        logits=weight.new_zeros(0, len(weight)),
        slots=state.copy_slots(),
        written01=list(state.written01),
        written=list(state.written),
        final=list(state.final),
        progress=state.progress,
    )


def standalone_batch(
    model: Qwen3ForCausalLM,
    ids_BT: Tensor,
    masked_BT: Tensor,
    history: Sequence[tuple[Tensor, Tensor]] | None,
    position_ids_BT: Tensor,
    visible: Tensor | None = None,
    config: Config | None = None,
    *,
    signal: Signal | None = None,
    bias_BT: Tensor | None = None,
    judge: Judge | None = None,
    before_BV: Tensor | None = None,
) -> list[StepResult]:
    """A batch without a session, row by row.

    history: per layer key and value [B, G, S, D], as a cache holds them; None = empty.
    visible: [B, T, S + T], bool or additive float.
    """
    results = []
    for b in range(len(ids_BT)):
        past = [(k[b], v[b]) for k, v in history] if history else qwen3.no_history(model)
        results.append(
            focus_step(
                model,
                RowState.fresh(model, ids_BT.shape[1]),
                ids_BT[b],
                masked_BT[b],
                past,
                position_ids_BT[b],
                None if visible is None else visible[b],
                config,
                signal=signal,
                bias_T=None if bias_BT is None else bias_BT[b],
                judge=judge,
                before_V=None if before_BV is None else before_BV[b],
                stale=False,
            )
        )
    return results
