"""Decoded tokens that a loop edits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import focus_compile
from focus_compile.runtime.block import BlockState, History
from tests.support.dialects import DIALECTS, Subject
from tests.support.harness import MASK, retained


@pytest.fixture(scope="module")
def subject() -> Subject:
    return Subject(DIALECTS["llada-canvas"])


def opening() -> Tensor:
    """One row: twelve tokens of which eight are masked."""
    ids = torch.randint(0, MASK, (1, 12), generator=torch.Generator().manual_seed(2))
    ids[:, 4:] = MASK
    return ids


@torch.no_grad()
@pytest.mark.parametrize("told", [True, False])
def test_an_edited_token(told: bool, subject: Subject) -> None:
    """Told of it, the row goes on: that token is computed anew, and other final ones are not fed.

    Otherwise the row starts anew, for nothing tells an edit from another text.
    """
    ids = opening()
    with focus_compile.session(alpha=1.0, first_step="evict", rescue=None) as focus:
        for _ in range(2):
            subject.compiled(input_ids=ids, output_hidden_states=True)
        ids[0, 1] = (ids[0, 1] + 1) % MASK
        if told:
            focus.edited = torch.arange(12)[None] == 1
        subject.compiled(input_ids=ids, output_hidden_states=True)
        assert focus.edited is None and focus.retain_mask is not None
        assert focus.retain_mask[0, 1]
        _, second, third = focus.stats.fed_per_step
    assert second < 12
    assert third == (second + 1 if told else 12)


@torch.no_grad()
def test_an_edit_is_computed(subject: Subject) -> None:
    """Nothing evicted: the logits of the edited token are eager's, those of its text."""
    ids = opening()
    with focus_compile.session(alpha=1e9) as focus:
        subject.compiled(input_ids=ids, output_hidden_states=True)
        ids[0, 3] = (ids[0, 3] + 1) % MASK
        focus.edited = torch.arange(12)[None] == 3
        actual = subject.compiled(input_ids=ids, output_hidden_states=True).logits
    expected = subject.model(input_ids=ids, output_hidden_states=True).logits
    computed = retained(actual)
    assert computed[0, 3]
    before = opening()
    old = subject.model(input_ids=before, output_hidden_states=True).logits
    near, far = (actual[0, 3] - expected[0, 3]).abs().max(), (old - expected)[0, 3].abs().max()
    assert near < 0.5 * far


def state_of(ids: Tensor, masks: Tensor) -> BlockState:
    state = BlockState(ids, masks, History(0, None))
    everything = torch.ones_like(masks)
    state.advance(everything, everything, {}, True)
    return state


def test_what_is_no_edit() -> None:
    """A token that was told of and is the same, or masked again, or of another shape."""
    ids, masks = torch.tensor([[3, 4, 5, 6]]), torch.tensor([[True, False, False, False]])
    told = torch.tensor([[False, True, True, True]])
    state = state_of(ids, masks)
    state.observe(torch.tensor([[3, 9, 5, 6]]), masks, History(0, None), edited=told)
    assert state.warm.all() and state.final.tolist() == [[False, False, True, True]]
    again = torch.tensor([[True, False, True, False]])
    state.observe(torch.tensor([[3, 9, 5, 6]]), again, History(0, None), edited=told)
    assert not state.warm.any()
    state = state_of(ids, masks)
    state.observe(torch.tensor([[3, 9, 5, 6]]), masks, History(0, None), edited=told[:, 1:])
    assert not state.warm.any()
