"""What a session carries from call to call, when a row starts anew, and what it refuses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from inspect import signature
from typing import Any

import pytest
import torch
from torch import Tensor

import focus_compile
from focus_compile import EvictedTokenDecoded, Session
from tests.support.harness import MASK, Call, Run, Sizes, bound, build_model, random_call, retained

BATCH, TOKENS, HISTORY = 3, 9, 7


@pytest.fixture(scope="module")
def run() -> Run:
    return Run(build_model(Sizes(layers=3)), {"alpha": 1.2}, dynamic=True)


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def call_with(run: Run, batch: int = BATCH, history: int = HISTORY) -> Call:
    """The first call of a block: everything is masked."""
    masked = torch.ones(batch, TOKENS, dtype=torch.bool)
    return random_call(3, run.model, batch, TOKENS, history, "bool", masked)


def decode(call: Call, chosen: Tensor, token: int = 5) -> Call:
    """The next call of the block: some positions were decoded."""
    ids = call.ids.masked_fill(chosen, token)
    return dataclasses.replace(call, ids=ids, masked=ids == MASK)


def leftmost(flags: Tensor, count: int = 1) -> Tensor:
    return flags & (flags.cumsum(1) <= count)


def in_mid_block(run: Run, focus: Session) -> Call:
    """Two steps of a block in all rows, and the call of the third."""
    call = call_with(run)
    for count in (3, 1):
        run.logits(call)
        assert focus.retain_mask is not None
        call = decode(call, leftmost(call.masked & focus.retain_mask, count))
    return call


def mask_again(call: Call) -> Call:
    ids = call.ids.clone()
    ids[1, 0] = MASK
    return dataclasses.replace(call, ids=ids, masked=ids == MASK)


def change_id(call: Call) -> Call:
    ids = call.ids.clone()
    ids[1, 0] += 1
    return dataclasses.replace(call, ids=ids)


def change_history(call: Call) -> Call:
    """Another history of the same length: the last position differs."""
    assert call.past is not None
    past = [(key.clone(), value) for key, value in call.past]
    for key, _ in past:
        key[1, :, -1] += 1
    return dataclasses.replace(call, past=past)


def shrink_history(call: Call) -> Call:
    assert call.past is not None
    past = [(key[:, :, :-2], value[:, :, :-2]) for key, value in call.past]
    assert call.visible is not None
    return dataclasses.replace(call, past=past, visible=call.visible[:, :, 2:].clone())


def one_row_less(call: Call) -> Call:
    assert call.past is not None
    past = [(key[1:], value[1:]) for key, value in call.past]
    rest = {
        name: vars(call)[name][1:].clone() for name in ("ids", "masked", "positions", "visible")
    }
    return dataclasses.replace(call, past=past, **rest)


def narrow_ids(call: Call) -> Call:
    return dataclasses.replace(call, ids=call.ids.int())


CHANGES: dict[Callable[[Call], Call], list[int]] = {
    mask_again: [1],
    change_id: [1],
    change_history: [1],
    shrink_history: [0, 1, 2],
    one_row_less: [0, 1],
    narrow_ids: [0, 1, 2],
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_starts_a_row_anew(run: Run, change: Callable[[Call], Call]) -> None:
    """Rows that start anew are those of a fresh session; the others go on."""
    anew = CHANGES[change]
    with focus_compile.session() as focus:
        going_on = run.logits(in_mid_block(run, focus))
    with focus_compile.session() as focus:
        changed = change(in_mid_block(run, focus))
        actual = run.logits(changed)
        fed = focus.stats.fed_per_step[-1]
    with focus_compile.session():
        fresh = run.logits(changed)
    for row in range(len(changed.ids)):
        expected = fresh[row] if row in anew else going_on[row]
        assert torch.equal(retained(actual[row]), retained(expected))
        assert (actual[row] - expected).abs().max() <= bound(expected)
        if going_on.shape == fresh.shape:
            assert (fresh[row] - going_on[row]).abs().max() > bound(expected)
    assert fed > len(anew) * TOKENS - 1
    assert fed < len(changed.ids) * TOKENS or len(anew) == len(changed.ids)


def test_a_generation_has_the_settings_around_it() -> None:
    """Every parameter but the form of its logits; the audit is one for all."""
    settings: dict[str, Any] = {
        "mask_token_id": 7, "alpha": 2.5, "visibility": "prefix", "signal": "position",
        "enabled": False, "shifted_logits": True, "exact": True, "first_step": "open",
        "rescue": 0.5, "calibration": None, "audit": 3, "tokens_per_step": 2,
        "evict": "auto",
    }  # fmt: skip
    assert {*settings, "logits"} == {*signature(Session).parameters}
    around = Session(**settings)
    inner = around.request(alpha=3.5)
    for name, value in settings.items() - {("alpha", 2.5), ("audit", 3)}:
        assert getattr(inner, name) == value != getattr(Session(), name) or value is None
    assert inner.alpha == 3.5 and inner.stats.audit is around.stats.audit is not None


def test_a_dense_call_ends_every_block(run: Run) -> None:
    """A request that died in its first step leaves nothing, even for the same prompt."""
    call = call_with(run)
    with focus_compile.session():
        first = run.logits(call)
        again = run.logits(call)
    whole = decode(call, call.masked)
    with focus_compile.session() as focus:
        run.logits(call)
        run.compiled(**whole.kwargs(run.model))
        after = run.logits(call)
    assert focus.stats.dense_calls == 1
    assert torch.equal(after, first)
    assert not torch.equal(again, first)  # without the dense call its slots are visible


def test_reset_forgets(run: Run) -> None:
    with focus_compile.session() as focus:
        call = in_mid_block(run, focus)
        focus.masked = call.masked
        focus.reset()
        assert focus.masked is None
        assert focus.retain_mask is None
        actual = run.logits(call)
    with focus_compile.session():
        assert torch.equal(actual, run.logits(call))


def test_a_history_that_another_path_has_made(run: Run) -> None:
    """An encoder or an eager model commits the block: its keys and values are as good as any."""
    call, longer = call_with(run), call_with(run, history=HISTORY + TOKENS)
    with focus_compile.session():
        alone = run.logits(longer)
    with focus_compile.session():
        run.logits(call)
        assert torch.equal(run.logits(longer), alone)


def test_decoding_an_evicted_token_is_noticed(run: Run) -> None:
    call = call_with(run)
    with focus_compile.session() as focus:
        run.logits(call)
        assert focus.retain_mask is not None
        evicted = ~focus.retain_mask
        evicted[0] = False
        row, position = evicted.nonzero()[0].tolist()
        with pytest.raises(
            EvictedTokenDecoded, match=f"row 1 decoded position {position} .*session.retain_mask"
        ) as caught:
            run.compiled(**decode(call, leftmost(evicted)).kwargs(run.model))
    assert (caught.value.row, caught.value.position) == (row, position) == (1, position)


def test_masks_given_by_hand(run: Run) -> None:
    """They count for one call, and instead of the mask token."""
    call = call_with(run)
    given = torch.zeros_like(call.masked)
    given[:, 2:] = True
    with focus_compile.session() as focus:
        focus.masked = given
        run.logits(call)
        assert focus.masked is None
        by_hand = focus.retain_mask
    named = dataclasses.replace(call, ids=torch.where(given, 17, 4))
    with focus_compile.session(mask_token_id=17) as focus:
        run.logits(named)
        by_token = focus.retain_mask
    assert by_hand is not None
    assert by_token is not None
    assert by_hand[:, :2].all()
    assert by_token[:, :2].all()
    assert not by_hand.all()


def test_masks_of_another_shape_or_dtype_are_refused(run: Run) -> None:
    call = call_with(run)
    with focus_compile.session() as focus:
        with pytest.raises(ValueError, match=r"session.masked has dtype torch.int64: expected"):
            focus.masked = call.ids
        focus.masked = call.masked[:, 1:]
        with pytest.raises(ValueError, match=r"shape \(3, 8\): the token ids have \(3, 9\)"):
            run.compiled(**call.kwargs(run.model))


def test_retain_mask_is_public(run: Run) -> None:
    with focus_compile.session() as focus:
        assert focus.retain_mask is None
        logits = run.logits(call_with(run))
        assert focus.retain_mask is not None
        assert torch.equal(focus.retain_mask, retained(logits))
        assert focus.stats.retained_per_step == [int(retained(logits).sum())]
        assert focus.stats.fed_per_step == [BATCH * TOKENS]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("alpha", 0.5, "alpha=0.5: expected a number >= 1"),
        ("alpha", float("nan"), "alpha=nan: expected a number >= 1"),
        ("visibility", "all", "visibility='all': expected 'written' or 'prefix'"),
    ],
)
def test_options_out_of_range(name: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message), focus_compile.session(**{name: value}):  # type: ignore[arg-type]
        pass
