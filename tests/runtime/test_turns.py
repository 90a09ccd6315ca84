"""Bare loops that make several calls in a step, or hold rows together: guidance, requests in turn.

What is decoded there stands on the logits of several calls or rows. A token that one of them has
evicted would be decoded by what is left of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from focus_compile import EvictedTokenDecoded
from focus_compile.runtime.block import BlockState, History
from focus_compile.runtime.implicit import session_here
from focus_compile.runtime.turns import kept_together
from tests.runtime.test_bare import BLOCK, PROMPT, best_of, canvas, compiled_with, evicted_of
from tests.support.harness import MASK
from tests.support.models.llada import LLaDA

Combine = Callable[[Any, Tensor, Tensor], list[Tensor]]
"""A model, ids, ids without their prompt: the logits of one step, the conditional ones first."""


@pytest.fixture(scope="module")
def model() -> LLaDA:
    torch.manual_seed(0)
    return LLaDA(groups=2).eval()


@pytest.fixture(scope="module")
def compiled(model: LLaDA) -> Iterator[Any]:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=32, fail_on_recompile_limit_hit=True):
        yield compiled_with(model, alpha=1.0)


@pytest.fixture(autouse=True)
def anew() -> Iterator[None]:
    session_here().reset()
    yield


def one_batch(model: Any, ids: Tensor, without: Tensor) -> list[Tensor]:
    return list(model(input_ids=torch.cat([ids, without])).logits.chunk(2))


def in_turn(model: Any, ids: Tensor, without: Tensor) -> list[Tensor]:
    return [model(input_ids=ids).logits, model(input_ids=without).logits]


def without_first(model: Any, ids: Tensor, without: Tensor) -> list[Tensor]:
    return in_turn(model, without, ids)[::-1]


def negative(model: Any, ids: Tensor, without: Tensor) -> list[Tensor]:
    """Another prompt in place of none, in one batch."""
    other = ids.clone()
    other[:, :PROMPT] = (ids[:, :PROMPT] + 7) % MASK
    return one_batch(model, ids, other)


def three(model: Any, ids: Tensor, without: Tensor) -> list[Tensor]:
    """Without a prompt, and with half of it."""
    half = ids.clone()
    half[:, : PROMPT // 2] = MASK
    return [model(input_ids=each).logits for each in (ids, without, half)]


def twice(model: Any, ids: Tensor, without: Tensor) -> list[Tensor]:
    """The same ids: two calls that differ in what nobody sees, such as a mask."""
    return in_turn(model, ids, ids)


WAYS: dict[str, Combine] = {
    "one batch": one_batch,
    "in turn": in_turn,
    "without first": without_first,
    "negative": negative,
    "three": three,
    "twice": twice,
}


@dataclass
class Tally:
    evicted: int = 0
    torn: int = 0
    """Tokens decoded where one of the calls had computed something, and another had not."""
    places: list[Tensor] = field(default_factory=list)


def guided(model: Any, ids: Tensor, combine: Combine, tally: Tally, count: int = 2) -> Tensor:
    """Classifier-free guidance, block by block over one canvas."""
    ids = ids.clone()
    prompt = ids != MASK
    for start in range(PROMPT, ids.shape[1], BLOCK):
        for _ in range(BLOCK // count):
            logits = combine(model, ids, ids.masked_fill(prompt, MASK))
            gone = torch.stack([evicted_of(each) & (ids == MASK) for each in logits])
            base = torch.stack(logits[1:]).mean(0)
            score = base + 2 * (logits[0] - base)
            at, token = best_of(score, ids, slice(start, start + BLOCK), count)
            tally.evicted += int(gone.sum())
            tally.torn += int((gone.any(0) & ~gone.all(0)).gather(1, at).sum())
            ids.scatter_(1, at, token.gather(1, at))
    return ids


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_guidance(way: str, compiled: Any) -> None:
    """It ends, and decodes no token that one call alone has computed."""
    tally = Tally()
    for seed in range(4):
        session_here().reset()
        made = guided(compiled, canvas(seed), WAYS[way], tally)
        assert not bool((made == MASK).any())
        assert torch.equal(made[:, :PROMPT], canvas(seed)[:, :PROMPT])
    assert tally.torn == 0
    assert (tally.evicted > 0) == (way in ("one batch", "negative"))


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_guidance_that_evicts_nothing(way: str, model: LLaDA) -> None:
    compiled = compiled_with(model, exact=True)
    for seed in range(2):
        made = guided(compiled, canvas(seed), WAYS[way], Tally())
        assert torch.equal(made, guided(model, canvas(seed), WAYS[way], Tally()))


@torch.no_grad()
def test_requests_without_prompts(compiled: Any, model: LLaDA) -> None:
    """Two that take turns, and begin alike: one takes the least probable tokens."""
    exact = compiled_with(model, exact=True)
    blank = torch.full((1, 24), MASK)

    def both(model: Any) -> list[Tensor]:
        ids = [blank.clone(), blank.clone()]
        for _ in range(12):
            for number, each in enumerate(ids):
                left = int((each == MASK).sum())
                logits = model(input_ids=each).logits * (-1) ** number
                if left:
                    at, token = best_of(logits, each, slice(None), min(2, left))
                    ids[number] = each.scatter(1, at, token.gather(1, at))
        return ids

    for made, expected in zip(both(compiled), both(exact), strict=True):
        assert torch.equal(made, expected)


def two_steps(compiled: Any) -> tuple[Tensor, Tensor]:
    """Ids of which the last call has evicted tokens, and these."""
    ids = canvas(0, 1)
    for _ in range(3):
        logits = compiled(input_ids=ids).logits
        before = ids
        at, token = best_of(logits, ids, slice(None), 2)
        ids = ids.scatter(1, at, token.gather(1, at))
    gone = evicted_of(logits) & (before == MASK)
    assert bool(gone.any())
    return before, gone


@pytest.mark.parametrize("between", ["another request", "no prompt", "a prefill"])
@torch.no_grad()
def test_a_token_that_was_lost_before_another_call(between: str, compiled: Any) -> None:
    """It was decoded from the call that evicted it, whatever was called since; it is said once."""
    ids, gone = two_steps(compiled)
    given = {
        "another request": canvas(5, 1),
        "no prompt": ids.clone().index_fill(1, torch.arange(PROMPT), MASK),
        "a prefill": torch.full((1, 9), 3),
    }[between]
    compiled(input_ids=given)
    ids = ids.masked_fill(gone & (gone.cumsum(1) == 1), 3)
    with pytest.raises(EvictedTokenDecoded):
        compiled(input_ids=ids)
    assert not bool(evicted_of(compiled(input_ids=ids).logits).any())


@torch.no_grad()
def test_one_step_of_two_calls(compiled: Any) -> None:
    """After it the loop is what it was: its second single step evicts again."""
    ids, _ = two_steps(compiled)
    saved = []
    for calls in (2, 1, 1, 1):
        for _ in range(calls):
            logits = compiled(input_ids=ids).logits
        saved.append(int(evicted_of(logits).sum()))
        at, token = best_of(logits, ids, slice(None), 2)
        ids = ids.scatter(1, at, token.gather(1, at))
    assert saved[:2] == [0, 0] and saved[2] > 0


def state_of(ids: Tensor) -> BlockState:
    """Rows of one block, all masked at its first call."""
    start = torch.full_like(ids, MASK)
    state = BlockState(start, start == MASK, History(0, None))
    state.ids, state.masked = ids, ids == MASK
    return state


def test_rows_that_are_decoded_together() -> None:
    """Alike in what was decoded, at the same places; a row that decoded nothing has no partner."""
    M = MASK
    state = state_of(torch.tensor([[1, M, M, M], [1, M, M, M], [2, M, M, M], [M, M, M, M]]))
    kept = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1], [0, 0, 0, 1]]).bool()
    expected = torch.tensor([[0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]).bool()
    found = kept_together(state, kept, shifted_logits=False)
    assert found is not None and torch.equal(found, expected)
    assert kept_together(state, kept[[0, 0, 2, 3]], shifted_logits=False) is None


def test_rows_of_shifted_logits() -> None:
    """The token before a masked one is needed, though the partner knows it."""
    M = MASK
    start = torch.tensor([[5, M, M], [M, M, M]])
    state = BlockState(start, start == MASK, History(0, None))
    state.ids = torch.tensor([[5, M, 1], [M, M, 1]])
    state.masked = state.ids == MASK
    kept = torch.tensor([[1, 1, 1], [0, 1, 1]]).bool()
    found = kept_together(state, kept, shifted_logits=True)
    assert found is not None and found.tolist() == [[False] * 3, [True, False, False]]
    assert kept_together(state, kept, shifted_logits=False) is None
