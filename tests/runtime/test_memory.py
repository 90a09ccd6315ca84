"""What a session holds, and what is never made: copies of slots, logits on the canvas."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

import focus_compile
from focus_compile import PackedLogits, Session
from focus_compile.runtime.logits import Logits
from tests.support.harness import CACHE, MASK, VOCAB, Call, Run, Sizes, build_model, random_call

BATCH, TOKENS, HISTORY = 3, 9, 7
SIZES = Sizes(layers=3)


@pytest.fixture(scope="module")
def run() -> Run:
    return Run(build_model(SIZES), {"alpha": 1.2}, dynamic=True)


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def first_call(run: Run) -> Call:
    masked = torch.ones(BATCH, TOKENS, dtype=torch.bool)
    return random_call(3, run.model, BATCH, TOKENS, HISTORY, "bool", masked)


def next_call(call: Call, focus: Session) -> Call:
    """The leftmost retained mask of every row is decoded."""
    assert focus.retain_mask is not None
    where = call.masked & focus.retain_mask
    ids = call.ids.masked_fill(where & (where.cumsum(1) <= 1), 5)
    return dataclasses.replace(call, ids=ids, masked=ids == MASK)


def slots(focus: Session) -> dict[str, Tensor]:
    (state,) = focus._states.values()
    return state.slots


def steps(run: Run, focus: Session, count: int = 4) -> list[tuple[Tensor, Tensor]]:
    """Logits, and the addresses of the slots, of some steps of one block."""
    call, out = first_call(run), []
    for _ in range(count):
        logits = run.logits(call)
        out.append((logits, torch.tensor([slot.data_ptr() for slot in slots(focus).values()])))
        call = next_call(call, focus)
    return out


def generated(run: Run) -> focus_compile.Generated:
    """One block after a random prompt."""
    out = focus_compile.generate(
        run.compiled,
        torch.randint(0, MASK, (BATCH, HISTORY)),
        max_new_tokens=TOKENS,
        block_length=TOKENS,
        mask_token_id=MASK,
        return_dict=True,
    )
    return out


def test_slots_are_what_the_last_call_returned(run: Run) -> None:
    """layers x 2 x B x G x (S + T) x D numbers, and nothing else.

    One is a copy, the last layer's values: in the caller's, slots of evicted tokens are marked.
    """
    with focus_compile.session() as focus:
        out = run.compiled(**first_call(run).kwargs(run.model))
        returned = {layer.keys.data_ptr() for layer in out[CACHE].layers}
        returned |= {layer.values.data_ptr() for layer in out[CACHE].layers}
        held = {slot.untyped_storage().data_ptr(): slot for slot in slots(focus).values()}
        assert len(returned - set(held)) == len(set(held) - returned) == 1
        total = sum(slot.untyped_storage().nbytes() for slot in held.values())
        keys = BATCH * SIZES.groups * (HISTORY + TOKENS) * SIZES.head_dim
        assert total == SIZES.layers * 2 * keys * 4


def test_slots_are_written_in_place_where_the_caller_drops_them(run: Run) -> None:
    """The same memory through a whole block, and the same logits as with copies."""
    with focus_compile.session() as focus:
        copied = steps(run, focus)
    with focus_compile.session() as focus:
        focus.owns_kv = True
        reused = steps(run, focus)
    for (logits, _), (expected, _) in zip(reused, copied, strict=True):
        assert torch.equal(logits, expected)
    assert all(torch.equal(place, reused[0][1]) for _, place in reused)
    assert not torch.equal(copied[0][1], copied[1][1])


def test_another_history_is_not_written_into_old_slots(run: Run) -> None:
    """One row gets another history of the same length: its slots are copied, its past is new."""
    call = first_call(run)
    assert call.past is not None
    past = [(key.clone(), value.clone()) for key, value in call.past]
    for key, value in past:
        key[1], value[1] = -key[1], -value[1]
    other = dataclasses.replace(call, past=past)
    with focus_compile.session():
        expected = run.logits(other)
    with focus_compile.session() as focus:
        focus.owns_kv = True
        run.logits(call)
        logits = run.logits(other)
    assert torch.equal(logits[1], expected[1])


def test_an_interrupted_step_is_forgotten(run: Run) -> None:
    """Slots half written are nobody's: the next call starts the block anew."""
    call = first_call(run)
    with focus_compile.session() as focus:
        expected = run.logits(call)
    with focus_compile.session() as focus:
        focus.owns_kv = True
        run.logits(call)
        later = next_call(call, focus)
        with (
            patch("focus_compile.programs.program.Program.__call__", side_effect=KeyboardInterrupt),
            pytest.raises(KeyboardInterrupt),
        ):
            run.compiled(**later.kwargs(run.model))
        assert not focus._states
        assert torch.equal(run.logits(call), expected)


def test_packed_logits(run: Run) -> None:
    """Those of retained tokens, in row-major order; the model's output is one zero, expanded."""
    call = first_call(run)
    with focus_compile.session() as focus:
        canvas = run.logits(call)
        assert focus.logits is None
        kept = focus.retain_mask
    assert kept is not None and 0 < int(kept.sum()) < kept.numel()
    with focus_compile.session(logits="packed") as focus:
        out = run.logits(call)
        packed = focus.logits
    assert isinstance(packed, PackedLogits)
    assert packed.values.shape == (int(kept.sum()), VOCAB)
    assert torch.equal(torch.stack([packed.rows, packed.positions], 1), kept.nonzero())
    assert torch.equal(packed.values, canvas[kept])
    assert out.shape == canvas.shape and not out.any()
    assert out.untyped_storage().nbytes() == out.element_size()
    assert focus.logits is None  # the session has ended


def test_no_canvas_of_logits_in_generate(run: Run) -> None:
    def refuse(*_: Any) -> Tensor:
        raise AssertionError("logits were spread over the canvas")

    generated(run)  # a program's first masked call proves that its logits are the model's
    with patch("focus_compile.runtime.outputs.restore", refuse):
        out = generated(run)
        assert out.focus_steps == out.forwards > 0
        with pytest.raises(AssertionError, match="spread over the canvas"):
            run.compiled(**first_call(run).kwargs(run.model))


def test_packed_logits_of_a_model_that_returns_none(run: Run) -> None:
    program = run.program_of(first_call(run))
    known = program.logits
    program.logits = Logits(dataclasses.replace(program.halves, logits=None), program.read_as)
    try:
        message = "the model returns no value with a row per token"
        with focus_compile.session(logits="packed"), pytest.raises(ValueError, match=message):
            run.compiled(**first_call(run).kwargs(run.model))
    finally:
        program.logits = known


def test_focus_switched_off(run: Run) -> None:
    """The dense program, in masked calls and in generate."""
    dense, prefix, suffix = run.counts()
    with focus_compile.session(enabled=False):
        run.compiled(**first_call(run).kwargs(run.model))
        out = generated(run)
    assert out.focus_steps == 0 < out.forwards
    assert run.counts() == (dense + 1 + 2 + out.forwards, prefix, suffix)


def test_layout_of_logits_is_checked() -> None:
    with (
        pytest.raises(ValueError, match="logits='dense': expected 'canvas' or 'packed'"),
        focus_compile.session(logits="dense"),
    ):
        pass
