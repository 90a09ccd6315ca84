"""What fuzzing found, each with the smallest call that shows it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import focus_compile
from focus_compile.errors import EmptyCall
from focus_compile.generation import batch
from focus_compile.generation.batch import CachedBatch
from tests.fuzz.caller import Caller
from tests.fuzz.plan import Plan
from tests.fuzz.play import Player
from tests.fuzz.subjects import SUBJECTS, Subject, subject
from tests.support.harness import MASK, Sizes, build_model


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def caller(batch: int = 3, tokens: int = 5, history: int = 7) -> Caller:
    """Its blocks are all masks."""
    return Caller(1, batch, tokens, history, given=False)


def played(name: str, **plan: object) -> Counter[str]:
    tally: Counter[str] = Counter()
    sizes = {"seed": 1, "batch": 3, "tokens": 6, "history": 4} | plan
    Player(subject(name), Plan(**sizes), tally).run()  # type: ignore[arg-type]
    return tally


@pytest.mark.parametrize("name", ["qwen3", "llada", "llada2-dense"])
def test_a_batch_as_large_as_the_block(name: str) -> None:
    """Was refused: Dynamo gives both one symbol, and torch keeps ``s * s // s`` as it is."""
    fresh = Subject(SUBJECTS[name])
    history = 3 if fresh.dialect.history else 0
    fresh.kinds.add((2, 2, min(history, 2)))  # not captured with other sizes before
    fresh.logits(fresh.compiled, caller(6, 6, history).draw())
    assert fresh.suffixes() == 1


@pytest.mark.parametrize(("name", "batch"), [("llada", 3), ("llada-dual", 1)])
def test_a_call_of_one_token(name: str, batch: int) -> None:
    """Was refused with a reason that was none: a block of one token has nothing to evict."""
    fresh = Subject(SUBJECTS[name])
    draw = caller(batch, 1).draw()
    actual = fresh.logits(fresh.compiled, draw)
    torch.testing.assert_close(actual, fresh.logits(fresh.model, draw))
    assert not fresh.executables


@pytest.mark.parametrize("event", ["dense", "single"])
def test_masks_are_for_one_call(event: str) -> None:
    """Were left for the next call by one with FOCUS switched off, or of a single token."""
    events = (("step", 1), (event, 1), ("manner", 0), ("step", 1), ("step", 2))
    assert played("qwen3", given=True, events=events)["calls"] == 3


def test_masks_of_an_empty_call() -> None:
    """Were left for the next call."""
    one = subject("qwen3")
    draw = caller().draw()
    one.logits(one.compiled, draw)
    program = one.executables[0]
    ids = program.layout.ids
    with focus_compile.session() as focus:
        focus.masked = draw.masked
        with pytest.raises(EmptyCall):
            program(*[draw.ids[:0]] * (ids + 1))
        assert focus.masked is None


def test_one_token_ends_a_block() -> None:
    """Was not noticed by the session, which then took the grown history for one with holes."""
    events = (("step", 1), ("step", 1), ("single", 0), ("grow", 0), ("step", 2))
    tally = played("qwen3", events=events)
    assert tally["calls"] == 4 and not tally["UncommittedHistory"]


def test_a_refused_graph_ends_a_block() -> None:
    """Its calls are dense ones: they take the masks given for them, and commit."""
    one = Subject(SUBJECTS["qwen3"])
    one.options = {"strict": False}
    draw = caller().draw()
    with focus_compile.session() as focus:
        one.logits(one.compiled, draw)
        focus.masked = draw.masked
        with torch.autocast("cpu", torch.bfloat16):
            one.logits(one.compiled, draw)
        assert focus.masked is None and focus.stats.steps == 1
        (state,) = focus._states.values()
        assert state.committed
    assert int((draw.ids == MASK).sum()) == draw.ids.numel()


def test_generate_lays_out_what_it_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Was captured anew for one row or one key head: strides of dims of size 1, and offsets.

    With changing batches and prompts Dynamo's recompile limit was reached, and calls ran eagerly.
    Over a cache that grows, as of models that are not transformers'.
    """
    monkeypatch.setattr(batch, "hold", lambda *_: False)
    model = build_model(Sizes(layers=2, heads=2, groups=1))
    seen: list[torch.Tensor] = []

    def forward(
        self: CachedBatch,
        ids: torch.Tensor,
        *given: Any,
        plain: Any = CachedBatch.forward,
        **others: Any,
    ) -> torch.Tensor:
        logits: torch.Tensor = plain(self, ids, *given, **others)
        layers: list[Any] = self.cache.layers
        for layer in layers:
            layer.keys = layer.keys.transpose(1, 2).clone(memory_format=torch.contiguous_format)
            layer.keys = layer.keys.transpose(1, 2)
            assert layer.keys.is_contiguous()  # dims of size 1 do not count
        return logits

    def watch(_: Any, __: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["position_ids"])

    monkeypatch.setattr(CachedBatch, "forward", forward)
    model.register_forward_pre_hook(watch, with_kwargs=True)
    rows = CachedBatch(
        model, torch.ones(1, 5, dtype=torch.int64), torch.ones(1, 5, dtype=torch.bool)
    )
    rows.prefill()
    block, _ = rows.open_block(4, MASK, MASK)
    layers: list[Any] = rows.cache.layers
    assert all(layer.keys.stride() == torch.empty(1, 1, 5, 16).stride() for layer in layers)
    rows.peek(block)
    assert [(x.storage_offset(), x.stride(0)) for x in seen] == [(0, 5), (0, 4)]
