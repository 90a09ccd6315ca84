"""Which rows open a block: what the block before decoded in its first step (section 10)."""

from __future__ import annotations

import torch
from torch import Tensor

from focus_compile.runtime.block import BlockState, History

MASK, T = 9, 4


def masks(*rows: str) -> tuple[Tensor, Tensor]:
    """Ids and masks of rows of digits and dots."""
    ids = torch.tensor([[MASK if mark == "." else int(mark) for mark in row] for row in rows])
    return ids, ids == MASK


def history(length: int, *marks: float, before: tuple[float, ...] = ()) -> History:
    """A cache whose last key of each row is a number; ``before``: those of the call before."""
    key = torch.tensor(marks).view(-1, 1) if marks else None
    old = torch.tensor(before).view(-1, 1) if before else None
    return History(length, key, length, None, old)


def call(state: BlockState, rows: list[str], cache: History) -> None:
    ids, masked = masks(*rows)
    state.observe(ids, masked, cache)
    step(state)


def step(state: BlockState) -> None:
    everything = torch.ones_like(state.masked)
    state.advance(everything, everything, {}, True)


def fresh(rows: list[str], cache: History) -> BlockState:
    state = BlockState(*masks(*rows), cache)
    step(state)
    return state


def opens(state: BlockState, budget: float = 2.0) -> list[bool]:
    return state.opens(torch.tensor(budget)).tolist()


def test_a_new_request_opens() -> None:
    state = BlockState(*masks("....", "...."), history(0))
    assert opens(state) == [True, True] and not state.warm.any()
    step(state)
    assert state.warm.all()


def test_the_block_before_decides() -> None:
    """Three tokens in the first step are more than the budget of two; two are not."""
    state = fresh(["....", "....", "...."], history(3, 1.0, 2.0, 3.0))
    call(state, ["123.", "12..", "...."], history(3, 1.0, 2.0, 3.0))
    call(state, ["1234", "1234", "123."], history(3, 1.0, 2.0, 3.0))
    state.committed = True
    call(state, ["....", "....", "...."], history(7, 4.0, 5.0, 6.0, before=(1.0, 2.0, 3.0)))
    assert opens(state) == [True, False, False]
    assert opens(state, 3.0) == [False, False, False]


def test_a_block_of_one_step() -> None:
    """What is decoded between the only call and the commit was decoded in the first step."""
    state = fresh(["....", "12.."], history(3, 1.0, 2.0))
    state.committed = True
    call(state, ["....", "...."], history(7, 4.0, 5.0, before=(1.0, 2.0)))
    assert state.first_decoded.tolist() == [4, 2]


def test_another_request_opens() -> None:
    """Another history, one that did not grow by the block, or a row that was masked again."""
    for cache in (
        history(7, 4.0, before=(8.0,)), history(6, 4.0, before=(1.0,)), history(3, 4.0),
    ):  # fmt: skip
        state = fresh(["...."], history(3, 1.0))
        call(state, ["12.."], history(3, 1.0))
        state.committed = True
        call(state, ["...."], cache)
        assert opens(state, 99.0) == [True], cache
    state = fresh(["...."], history(3, 1.0))
    call(state, ["12.."], history(3, 1.0))
    call(state, [".2.."], history(3, 1.0))
    assert opens(state, 99.0) == [True]


def test_a_block_without_masks_tells_nothing() -> None:
    state = fresh(["...."], history(3, 1.0))
    call(state, ["1..."], history(3, 1.0))
    state.committed = True
    call(state, ["1234"], history(7, 2.0, before=(1.0,)))
    state.committed = True
    call(state, ["...."], history(11, 3.0, before=(2.0,)))
    assert state.first_decoded.tolist() == [1]


def test_blocks_of_a_canvas() -> None:
    """Without a cache the next block follows where nothing else has changed."""
    state = BlockState(*masks("...."), History(0, None))
    state.masked = torch.tensor([[True, True, False, False]])
    step(state)
    ids, _ = masks("12..")
    state.observe(ids, torch.tensor([[False, False, True, True]]), History(0, None))
    assert state.first_decoded.tolist() == [2]
    step(state)
    ids, _ = masks("92..")
    state.observe(ids, torch.tensor([[False, False, True, True]]), History(0, None))
    assert state.first_decoded.tolist() == [-1]
